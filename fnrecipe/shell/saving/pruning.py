"""Removing checkpoints of a run that nobody is training: by its own policy, or by another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from fnrecipe import checkpoint
from fnrecipe.checkpoint import MODEL, Policy, keep
from fnrecipe.checkpoint.damage import visible_damage
from fnrecipe.checkpoint.keep import Plan
from fnrecipe.config import RegimeSection, resolve
from fnrecipe.config.layers import nest, read_file
from fnrecipe.config.structure import structure
from fnrecipe.errors import UsageError
from fnrecipe.shell.directory import layout, lock
from fnrecipe.shell.directory.recorded_recipe import instead, recorded_recipe
from fnrecipe.shell.saving.keeping import model_parts, policy_of, scores_of


@attrs.frozen
class Pruned:
    """What becomes of the checkpoints of a run; `verified` is the step of the newest of which every byte is right."""

    plan: Plan
    verified: int


def prune(out: Path, *, last: int | None = None, every_n_steps: int | None = None, dry_run: bool = False) -> Pruned:
    """Removes the checkpoints of the run in `out` that its config does not keep; `last` and `every_n_steps` replace its own.

    The newest checkpoint of which every byte is right is always kept: those after it, which are damaged, do not count and are
    set aside.

    Raises:
        UsageError: if that is no run, or one is writing there.
        CheckpointError: if no checkpoint is whole.
    """
    if not (out / layout.CONFIG).is_file():
        raise UsageError(f"{out}: expected the output directory of a run, found {instead(out, layout.CONFIG)}")
    if dry_run:
        return _pruned(out, last, every_n_steps, apply=False)
    with lock.claimed(out):
        return _pruned(out, last, every_n_steps, apply=True)


def reasons(out: Path, steps: Sequence[int]) -> dict[int, str]:
    """Why the config of a run keeps its whole checkpoints of these steps; empty for those that it does not keep, or no run.

    Raises:
        UsageError: if the config or the metrics cannot be read.
    """
    if not (out / layout.CONFIG).is_file():
        return {}
    regime = _regime(out)
    policy, scores = policy_of(regime), scores_of(out, regime)
    entries = [keep.Entry(step, scores.get(step)) for step in sorted(steps)]
    last = {entry.step for entry in (entries if policy.last is None else entries[-policy.last :])}
    every, best = policy.every_n_steps, keep.best(entries, policy)
    found = {
        "last": last,
        f"every {every or 0:,}": {step for step in steps if every and step % every == 0},
        f"best {policy.best}": best,
    }
    return {step: ", ".join(name for name, those in found.items() if step in those) for step in steps}


def _pruned(out: Path, last: int | None, every_n_steps: int | None, *, apply: bool) -> Pruned:
    root, regime = out / layout.CHECKPOINTS, _regime(out)
    policy = policy_of(regime)
    policy = attrs.evolve(policy, last=last or policy.last, every_n_steps=every_n_steps or policy.every_n_steps)
    found = checkpoint.of_run(out)
    scores = scores_of(out, regime)
    plan = _plan(root, policy, scores, found.step)
    if apply:
        model = _model_parts(out) if policy.model_only else MODEL
        checkpoint.tidy(root, found.step)
        checkpoint.prune(root, policy, scores, model=model)
    return Pruned(plan, found.step)


def _plan(root: Path, policy: Policy, scores: Mapping[int, float], newest: int) -> Plan:
    """What `checkpoint.prune` makes of the checkpoints up to the step `newest`."""
    kinds = {False: checkpoint.models(root), True: checkpoint.committed(root)}
    steps = {
        step: whole
        for whole, directories in kinds.items()
        for path in directories
        if (step := checkpoint.step_of(path)) is not None and step <= newest and not visible_damage(path, step)
    }
    return keep.plan([keep.Entry(step, scores.get(step), model_only=not whole) for step, whole in steps.items()], policy)


def _regime(out: Path) -> RegimeSection:
    values = nest(read_file(out / layout.CONFIG, bounded=False)).get("regime", {})
    return structure(values, RegimeSection())


def _model_parts(out: Path) -> Sequence[str]:
    recipe = recorded_recipe(out)
    config, _ = resolve(recipe.config, [out / layout.CONFIG])
    return model_parts(recipe, config)
