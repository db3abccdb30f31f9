"""Evaluations of a run: sums of a loss over the first batches of a stream that begins anew each time, and other measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

import attrs

from fnrecipe.build import trained
from fnrecipe.data import Source
from fnrecipe.loss import Sums
from fnrecipe.observe import Tick
from fnrecipe.parallel.whole import whole
from fnrecipe.recipe import C, Findings, Measure, Recipe, Write
from fnrecipe.runtime.gang import Gang, all_gather_objects
from fnrecipe.runtime.signals import Stopped
from fnrecipe.runtime.transfer import fetch
from fnrecipe.shell.recording.jsonl import keep_texts, last_step, path_of, texts_of
from fnrecipe.shell.recording.means import means
from fnrecipe.shell.session import Session
from fnrecipe.step import State, averaged, shown
from fnrecipe.tree import Tree

T = TypeVar("T")


@attrs.frozen
class Evaluator(Generic[C]):
    """An evaluation, ready to be made every so many steps: of parameters it finds something, or nothing if a signal comes."""

    name: str
    session: Session[C]
    every_n_steps: int | None
    find: Callable[[Tree], Findings | None]

    def due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0


def shown_params(recipe: Recipe[C], config: C, state: State) -> Tree:
    """The parameters that a run shows numbers and text of: their average, or those that the optimizer shows."""
    average = config.trainer.average
    if average is not None and average.evaluate:
        return averaged(state)
    return shown(recipe.update(config), state, trained(recipe, config))


def evaluate(evaluator: Evaluator[C], tick: Tick, write: Write) -> None:
    """Records what is found, where that is due, unless it is recorded or a signal comes."""
    session, name = evaluator.session, evaluator.name
    if not (tick.last or evaluator.due(tick.number)):
        return
    recorded = session.gang.leads and last_step(path_of(session.out, name)) >= tick.number
    if all_gather_objects(session.gang, recorded)[0]:
        return
    found = evaluator.find(shown_params(session.recipe, session.config, tick.state))
    if found is None:
        return
    if session.gang.leads and found.texts:
        keep_texts(texts_of(session.out, name), tick.number, found.texts)
    row = means({"step": tick.number, **found.numbers}, name)
    write(name, [row])
    session.display.line(f"step {tick.number:,}  {_line(name, row)}")


def sums_of(session: Session[C], batches: Source[Tree], sums: Callable[[Tree, Tree], Sums], params: Tree) -> Findings | None:
    """The sums over the first batches of the stream: `sums(params, batch)` as the train step's device runs it."""
    some = islice(batches(None), session.config.regime.num_validation_batches)
    found = [sums(params, batch) for batch, _ in some]
    if session.gang.alone and session.signals.received is not None:
        return None
    rows = fetch(found, session.device).rows()
    total = {key: sum(row[key] for row in rows) for key in (rows[0] if rows else ())}
    return Findings(total) if total.get("targets") else None


def measured(session: Session[C], measure: Measure[T], params: Tree) -> Findings | None:
    """What the measure finds of the whole parameters, which each rank then holds; several ranks do not end it at a signal."""
    if not session.gang.alone:
        return _measured(session, measure, params)
    try:
        with session.signals.interruptible():
            return _measured(session, measure, params)
    except Stopped:
        return None


def in_turn(gang: Gang, parts: Sequence[Callable[[Tree], T]], params: Tree) -> list[T]:
    """What the parts give of parameters, in order: JSON values, each made by one rank."""
    mine = {number: part(params) for number, part in enumerate(parts) if number % gang.size == gang.rank}
    found = {int(number): value for of_rank in all_gather_objects(gang, mine) for number, value in of_rank.items()}
    return [found[number] for number in range(len(parts))]


def _measured(session: Session[C], measure: Measure[T], params: Tree) -> Findings:
    model = session.recipe.model(session.config, whole(params))
    return measure.total(in_turn(session.gang, measure.parts, model))


def _line(name: str, row: Mapping[str, float]) -> str:
    values = {key.removeprefix(f"{name}/"): value for key, value in row.items() if key != "step"}
    if "loss" not in values:
        return f"{name} {', '.join(f'{key} {value:.3f}' for key, value in values.items())}"
    bits = f", {values['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in values else ""
    return f"{'validation' if name == 'valid' else name} loss {values['loss']:.3f}{bits}"
