"""Writing the metrics of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from fnrecipe.errors import NonFiniteError, SpikeError
from fnrecipe.recipe import C, Row, Write
from fnrecipe.runtime import host
from fnrecipe.shell.guards.rollbacks import Passed
from fnrecipe.shell.guards.spikes import heed, told
from fnrecipe.shell.guards.stragglers import slowest, tell_straggler
from fnrecipe.shell.observers import Publication
from fnrecipe.shell.recording.means import means
from fnrecipe.shell.recording.throughput import Work
from fnrecipe.shell.session import Session


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
