"""What a run does at a step whose update was not made, under `regime.on_spike`: it tells which documents it saw, or goes back.

Going back: the steps up to `regime.spikes.pass_over` before the spike are what they were; the batches from there up to the
spike's are passed over. Everything behind is forgotten, checkpoints too, and only then is the rollback recorded: a run that is
killed before that finds the spike again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

import attrs

from fnrecipe import checkpoint, tree
from fnrecipe.build import init_train_state
from fnrecipe.data import Cursor
from fnrecipe.errors import SpikeError, UsageError, redacted
from fnrecipe.observe import Tick
from fnrecipe.recipe import C, Row
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.shell.directory import layout
from fnrecipe.shell.guards.rollbacks import Passed, num_passed_before, read, record
from fnrecipe.shell.recording.jsonl import append, path_of
from fnrecipe.shell.saving.copier import forget_copies_after
from fnrecipe.shell.saving.restore import restored
from fnrecipe.shell.session import Session
from fnrecipe.step import State

SPIKES = "spikes"
_FAILS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, UsageError)


@attrs.frozen
class Spike:
    """A step from which the run goes back: its metrics, and the cursor behind the batch of the step before."""

    row: Row
    cursor: Cursor

    @property
    def step(self) -> int:
        return int(self.row["step"])


class RollbackError(Exception):
    """Ends the fold, that the run may go back from a spike; never shown to anybody."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(f"step {spike.step}: a spike")
        self.spike = spike


def heed(session: Session[C], passed: Passed, rows: Sequence[Row], cursors: Sequence[Cursor]) -> None:
    """Writes a line for each of these steps that was skipped; `cursors` are those from which their batches came.

    Raises:
        RollbackError: at the first one from which the run goes back.
        SpikeError: if it has gone back too often.
    """
    regime, limit = session.config.regime, session.config.trainer.max_skipped_steps
    if regime.on_spike == "ignore":
        return
    for row, cursor in zip(rows, cursors, strict=True):
        spike = Spike(row, cursor)
        if regime.on_spike == "rollback" and (row["train/spike"] or row["train/skipped"] >= limit):
            if passed.rollbacks >= regime.spikes.max_rollbacks:
                raise SpikeError(
                    f"step {spike.step}: {told(row)}, and the run has gone back {passed.rollbacks} times "
                    f"(regime.spikes.max_rollbacks; what is passed over: {session.out / layout.ROLLBACKS})"
                )
            raise RollbackError(spike)
        if row["train/skipped"]:
            event = {"step": spike.step, **_facts(session, passed, spike)}
            session.display.line(f"step {spike.step:,} was skipped: {told(row)}; its documents are in metrics/{SPIKES}.jsonl")
            if session.gang.leads:
                append(path_of(session.out, SPIKES), [event])


def go_back(session: Session[C], spike: Spike, buffers: State | None) -> Tick:
    """The state from which the run goes on, in `buffers` if there are any; what is behind it is gone, and recorded.

    Raises:
        CheckpointError: if all checkpoints to which the run could go back are damaged; nothing is gone then.
    """
    passed, root = agreed(session), session.out / layout.CHECKPOINTS
    step = max(spike.step - session.config.regime.spikes.pass_over, 0)
    batches = passed.behind(step, spike.step)
    event = {"step": spike.step, "back_to": step, "batches": [batches[0], batches[-1]], **_facts(session, passed, spike)}
    found = checkpoint.newest(root, session.display.line, session.gang, up_to=step)
    number, cursor = (0, None) if found is None else (found.step, found.cursor)
    if session.gang.leads:
        forget_copies_after(session, number)
        checkpoint.forget_after(root, step)
        record(session.out, event)
    all_gather_objects(session.gang, step)
    what = f"batches {batches[0]:,} to {batches[-1]:,} are passed over, and steps behind {step:,} made anew"
    session.display.line(f"step {spike.step:,}: {told(spike.row)}: {what}, going on after step {number:,}")
    if found is None or buffers is None:
        state = init_train_state(session.recipe, session.config, session.mesh, session.device, pretrained=found is None)
    else:
        state = buffers
    state = state if found is None else restored(session, found, state)
    if buffers is not None:
        for buffer, value in zip(tree.leaves(buffers), tree.leaves(state), strict=True):
            buffer.copy_(value)
        state = attrs.evolve(buffers)
    return Tick(number, cursor, states=[state])


def agreed(session: Session[C]) -> Passed:
    """What the run passes over, as rank 0 reads it."""
    found = all_gather_objects(session.gang, attrs.astuple(read(session.out)) if session.gang.leads else None)[0]
    assert found is not None
    ranges, rollbacks = found
    return Passed(tuple((first, last) for first, last in ranges), rollbacks)


def told(row: Row) -> str:
    """What was wrong with a step that was skipped: its loss of … was above …"""
    names = [name for name in ("loss", "grad_norm") if row[f"train/{name}"] > row[f"train/{name}_limit"]]
    if row["train/spike"]:
        return " and ".join(f"{name} {row[f'train/{name}']:.4g} was above {row[f'train/{name}_limit']:.4g}" for name in names)
    finite = math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
    return f"{'the update' if finite else 'the loss or the gradient'} was not finite"


def _facts(session: Session[C], passed: Passed, spike: Spike) -> Mapping[str, object]:
    """The numbers of a step, its batch, and where the documents of the batch are, of all ranks; null: nobody knows."""
    names = ("loss", "loss_limit", "grad_norm", "grad_norm_limit", "skipped")
    numbers = {name: spike.row[f"train/{name}"] for name in names}
    known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"batch": passed.batch(spike.step), **known, "documents": _documents(session, passed, spike)}


def _documents(session: Session[C], passed: Passed, spike: Spike) -> Sequence[str] | None:
    mine: list[str] | None = None
    if session.recipe.documents is not None:
        before = num_passed_before(passed, spike.step)
        try:
            source = session.recipe.documents(session.config, session.assignment)
            mine = sorted({redacted(name) for names, _ in islice(source(spike.cursor), before, before + 1) for name in names})
        except _FAILS:  # the stream is not the recipe's own any more
            mine = None
    found = all_gather_objects(session.gang, mine)
    return None if None in found else sorted({name for names in found for name in names or ()})
