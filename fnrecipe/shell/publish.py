"""Publishing the metrics of steps, in groups.

On CUDA they are written one publication late, so that the device always has work; where the host waits for it anyway, before a
save, an evaluation and the end, all of them are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import attrs
import torch

from fnrecipe.data import Cursor
from fnrecipe.errors import NonFiniteError, SpikeError
from fnrecipe.observe import Ticks
from fnrecipe.recipe import C, Row, Write
from fnrecipe.runtime import host
from fnrecipe.runtime.clock import DeviceEvent, record_event
from fnrecipe.runtime.transfer import PendingCopy, fetch, publication_delay
from fnrecipe.shell.guards.rollbacks import Passed
from fnrecipe.shell.guards.spikes import heed, told
from fnrecipe.shell.guards.stragglers import slowest, tell_straggler
from fnrecipe.shell.recording.means import means
from fnrecipe.shell.recording.throughput import Clock, Work
from fnrecipe.shell.session import Session
from fnrecipe.step import Metrics


@attrs.frozen
class Publication:
    """Some steps: their metrics, on their way to the host; seconds that each waited for data; the clock, and when it stood.

    cursors  from which the batch of each came
    busy     seconds by rank, that each was at work in the step before and waited for data
    """

    metrics: PendingCopy
    waits: Sequence[float]
    cursors: Sequence[Cursor]
    busy: Sequence[Sequence[float]]
    clock: Clock
    pauses: Sequence[tuple[DeviceEvent, DeviceEvent]] = ()


def published(ticks: Ticks, *, write: Callable[[Publication], None], device: torch.device) -> Ticks:
    """Writes the metrics of all steps, in groups. The clock of a group leaves out the first step, saves and evaluations."""
    pending: list[tuple[Metrics, float, Cursor, Sequence[float]]] = []  # not ticks: they would keep their states
    pauses: list[tuple[DeviceEvent, DeviceEvent]] = []
    late: deque[Publication] = deque()
    clock: Clock | None = None
    cursor: Cursor = None
    for tick in ticks:
        if tick.metrics is not None:
            clock = clock or Clock(tick.number, record_event(device))  # the first step is traced
            pending.append((tick.metrics, tick.waited, cursor, tick.busy))
        cursor = tick.cursor
        if pending and tick.publish:
            assert clock is not None
            metrics, waits, cursors, busy = zip(*pending, strict=True)
            late.append(Publication(fetch(metrics, device), waits, cursors, busy, clock, pauses))
            pending, pauses = [], []
        while len(late) > (0 if tick.save or tick.evaluate or tick.last else publication_delay(device)):
            write(late.popleft())
        pause = record_event(device) if pending and tick.evaluate else None
        yield tick
        if clock is not None and not pending:
            clock = Clock(tick.number, record_event(device))
        if pause is not None:
            pauses.append((pause, record_event(device)))


def publish(session: Session[C], work: Work, write: Write, passed: Passed, publication: Publication) -> None:
    """Records a row for each step, and how fast all of them were.

    But for saving and evaluating, only here does the host wait for the device.

    Raises:
        NonFiniteError, SpikeError: if so many steps in a row were skipped that the run cannot go on.
        RollbackError: if the run goes back.
    """
    found = publication.metrics.rows()
    rows = [means(row, "train") for row in found]
    speed = publication.clock.speed(work, found, publication.waits, publication.metrics.ready, publication.pauses)
    write("train", rows)
    known = {f"perf/{name}": value for name, value in attrs.asdict(speed).items() if value is not None}
    straggler = slowest(publication.busy[publication.clock.behind(found) :])
    if straggler is not None:
        known |= {
            "perf/slowest_rank": straggler.rank,
            "perf/slowest_seconds": straggler.seconds,
            "perf/median_seconds": straggler.median,
        }
        tell_straggler(straggler, 1 / speed.steps_per_second)
    write("perf", [{"step": rows[-1]["step"], **known, "perf/peak_memory": host.peak_memory(session.device)}])
    session.display.step(rows[-1], speed)
    heed(session, passed, rows, publication.cursors)
    _check_skipped(rows, session.config.trainer.max_skipped_steps)


def _check_skipped(rows: Sequence[Row], limit: int) -> None:
    for row in rows:
        scale = row.get("train/loss_scale")
        finite = math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
        what = "the update" if finite else "the loss or the gradient"
        if scale is not None and row["train/skipped"] and not finite:
            raise NonFiniteError(
                f"step {row['step']}: {what} was not finite, and half the loss scale of {scale:g} is below "
                f"the minimum of trainer.fp16_loss_scale; the parameters are those from before the steps that were not finite"
            )
        if row["train/skipped"] >= limit and row.get("train/spike"):
            raise SpikeError(
                f"step {row['step']}: {told(row)}, and {limit} steps in a row were skipped "
                f"(trainer.max_skipped_steps); the parameters are those from before them"
            )
        if row["train/skipped"] >= limit:
            raise NonFiniteError(
                f"step {row['step']}: {what} was not finite in {limit} steps in a row "
                f"(trainer.max_skipped_steps); the parameters are those from before them"
            )
