"""The evaluations of a recipe, ready to be made in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fnrecipe.build import make_evaluation
from fnrecipe.compiler import Backend
from fnrecipe.compiler.products import Choose
from fnrecipe.observe import Tick
from fnrecipe.recipe import C, Evaluation, Findings, Measurement, Write
from fnrecipe.shell.evaluate import Evaluator, evaluate, measured, sums_of
from fnrecipe.shell.saving.keeping import check_evaluation
from fnrecipe.shell.session import Session
from fnrecipe.shell.streams import evaluation_source
from fnrecipe.tree import Tree


def evaluators_of(session: Session[C], progress: Callable[[Backend], Backend], choose: Choose) -> list[Evaluator[C]]:
    """Those of the recipe; evaluations of the same loss share their traced function. What they read is opened."""
    recipe, config, usual = session.recipe, session.config, session.config.regime.validate_every_n_steps
    make = partial(
        make_evaluation,
        recipe,
        config=config,
        mesh=session.mesh,
        device=session.device,
        with_progress=progress,
        choose=choose,
        compiled=False,
    )
    own = make(Evaluation(recipe.stream))

    def find(name: str, evaluation: Evaluation[C] | Measurement[C]) -> Callable[[Tree], Findings | None]:
        if isinstance(evaluation, Measurement):
            return partial(measured, session, evaluation.make(config, session.device))
        source = evaluation_source(session, name, evaluation)
        return partial(sums_of, session, source, make(evaluation) if evaluation.loss else own)

    named = recipe.evaluations(config).items()
    check_evaluation(config.regime, [name for name, _ in named])
    return [Evaluator(name, session, each.every_n_steps or usual, find(name, each)) for name, each in named]


def evaluate_all(evaluators: Sequence[Evaluator[C]], write: Write, tick: Tick) -> None:
    for evaluator in evaluators:
        evaluate(evaluator, tick, write)


def any_due(evaluators: Sequence[Evaluator[C]], step: int) -> bool:
    return any(evaluator.due(step) for evaluator in evaluators)
