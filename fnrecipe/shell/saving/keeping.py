"""What a run keeps of its checkpoints: by its config, and by what evaluations have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fnrecipe.checkpoint import MODEL, Policy
from fnrecipe.config import RegimeSection
from fnrecipe.errors import UsageError, did_you_mean
from fnrecipe.recipe import C, Recipe
from fnrecipe.shell.recording.jsonl import found_in, path_of


def policy_of(regime: RegimeSection) -> Policy:
    return Policy(
        regime.keep_last_n_checkpoints,
        regime.keep_checkpoint_every_n_steps,
        regime.keep_best_n_checkpoints or 0,
        regime.lower_score_is_better,
        regime.keep_model_only,
    )


def model_parts(recipe: Recipe[C], config: C) -> Sequence[str]:
    """The parts of a state that hold its model, among them the optimizer's if that makes the parameters that are shown."""
    shown = recipe.update(config).shown is not None
    return (*MODEL, "optimizer") if shown else MODEL


def check_evaluation(regime: RegimeSection, evaluations: Sequence[str]) -> None:
    """Checks that the score by which checkpoints are kept is of an evaluation of the run.

    Raises:
        UsageError: if it is not.
    """
    name = regime.score_metric.partition("/")[0]
    if regime.keep_best_n_checkpoints is not None and name not in evaluations:
        hint = did_you_mean(name, evaluations)
        raise UsageError(f"regime.score_metric: expected EVALUATION/NAME, found no evaluation {name!r}; {hint}")


def scores_of(out: Path, regime: RegimeSection) -> Mapping[int, float]:
    """What evaluations have found so far of the steps by which the best checkpoints are chosen.

    Raises:
        UsageError: if they find nothing of that name.
    """
    if regime.keep_best_n_checkpoints is None:
        return {}
    metric = regime.score_metric
    rows = found_in(path_of(out, metric.partition("/")[0]))
    names = sorted({name for row in rows for name in row} - {"step"})
    if rows and metric not in names:
        expected = f"a number that metrics/{metric.partition('/')[0]}.jsonl has"
        raise UsageError(f"regime.score_metric: expected {expected}, found {metric}; {did_you_mean(metric, names)}")
    found = {row["step"]: row.get(metric) for row in rows}
    return {int(step): score for step, score in found.items() if step is not None and score is not None}
