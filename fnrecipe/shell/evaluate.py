"""Evaluations of a run: sums of a loss over the first batches of a stream that begins anew each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Generic

import attrs

from fnrecipe.build import trained
from fnrecipe.data import Source
from fnrecipe.loss import Sums
from fnrecipe.observe import Tick
from fnrecipe.recipe import C, Recipe, Write
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.runtime.transfer import fetch
from fnrecipe.shell.metrics import means
from fnrecipe.shell.recorders.jsonl import last_step, path_of
from fnrecipe.shell.session import Session
from fnrecipe.shell.streams import evaluation_source
from fnrecipe.step import State, averaged, shown
from fnrecipe.tree import Tree


@attrs.frozen(slots=False)
class Evaluator(Generic[C]):
    """An evaluation, ready to be made: `sums(params, batch)` as the train step's device runs it."""

    name: str
    session: Session[C]
    sums: Callable[[Tree, Tree], Sums]

    @cached_property
    def batches(self) -> Source[Tree]:
        """Made once, when it is first needed: it finds files and reads the tokenizer."""
        return evaluation_source(self.session, self.name)


def shown_params(recipe: Recipe[C], config: C, state: State) -> Tree:
    """The parameters that a run shows numbers and text of: their average, or those that the optimizer shows."""
    average = config.trainer.average
    if average is not None and average.evaluate:
        return averaged(state)
    return shown(recipe.update(config), state, trained(recipe, config))


def evaluate(evaluator: Evaluator[C], tick: Tick, write: Write) -> None:
    """Records the sums on the first batches of the stream, unless they are recorded or a signal comes."""
    session, name = evaluator.session, evaluator.name
    recorded = session.gang.leads and last_step(path_of(session.out, name)) >= tick.number
    if all_gather_objects(session.gang, recorded)[0]:
        return
    params = shown_params(session.recipe, session.config, tick.state)
    batches = islice(evaluator.batches(None), session.config.regime.num_validation_batches)
    sums = [evaluator.sums(params, batch) for batch, _ in batches]
    if session.gang.alone and session.signals.received is not None:
        return
    rows = fetch(sums, session.device).rows()
    total = {key: sum(row[key] for row in rows) for key in (rows[0] if rows else ())}
    if not total.get("targets"):
        return
    row = means({"step": tick.number, **total}, name)
    write(name, [row])
    bits = f", {row[f'{name}/bits_per_byte']:.3f} bits per byte" if f"{name}/bits_per_byte" in row else ""
    what = "validation" if name == "valid" else name
    session.display.line(f"step {tick.number:,}  {what} loss {row[f'{name}/loss']:.3f}{bits}")
