"""How fast steps are, and what share of the time they waited for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from fnrecipe.data import Cursor, Source, Stream
from fnrecipe.data.stream import T
from fnrecipe.models.flops import TokenFlops
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.clock import DeviceEvent
from fnrecipe.runtime.peaks import peak_flops
from fnrecipe.runtime.position import Position


@attrs.frozen
class Work:
    """What each step does, by all ranks together.

    positions  of its rows, with padding: what costs FLOPs; of a step that takes a part of a batch, times that part
    flops      of the model a position, if the recipe tells
    peak       FLOP/s of all devices together, if they are known
    parts      into how many parts a batch is cut at a step, of which that takes one
    """

    positions: int
    flops: TokenFlops | None
    peak: float | None
    parts: Callable[[int], int] = lambda step: 1


@attrs.frozen
class Speed:
    """How fast some steps were, by all ranks together.

    tokens_per_second     targets, or what the loss counts as tokens
    positions_per_second  of rows, with padding
    data_wait             share of the time that this rank waited for its stream
    model_flops_…, mfu    by the conventions of `TokenFlops`, and their share of the peak; None if that is not known
    """

    tokens_per_second: float
    positions_per_second: float
    steps_per_second: float
    data_wait: float
    model_flops_per_second: float | None
    causal_model_flops_per_second: float | None
    mfu: float | None
    causal_mfu: float | None


def work_of(recipe: Recipe[C], config: C, device: torch.device, ranks: int) -> Work:
    flops, peak = recipe.flops(config) if recipe.flops else None, peak_flops(host.device_name(device))
    rows = config.dataset.batch_size

    def parts(step: int) -> int:
        _, found = config.regime.part(step, rows)
        return int(found)

    return Work(rows * recipe.positions(config), flops, peak * ranks if peak else None, parts)


def speed(work: Work, targets: Sequence[float], waits: Sequence[float], seconds: float, batches: float | None = None) -> Speed:
    """The speed of steps with so many `targets` each, that took `seconds` in all and `waits` of them for data.

    `batches`: how many of these the steps took together; None: one each.
    """
    steps, tokens = len(targets) / seconds, sum(targets) / seconds
    positions = work.positions * (len(targets) if batches is None else batches) / seconds
    full, causal = (work.flops.full * positions, work.flops.causal * positions) if work.flops else (None, None)
    shares = [flops / work.peak if flops is not None and work.peak else None for flops in (full, causal)]
    return Speed(tokens, positions, steps, sum(waits) / seconds, full, causal, *shares)


@attrs.frozen
class Clock:
    """Started after a step, to tell the speed of the steps that follow: without tracing, saving and validating."""

    step: int
    started: DeviceEvent

    def behind(self, rows: Sequence[Mapping[str, float]]) -> int:
        """The number of the first row whose step counts."""
        return sum(row["step"] <= self.step for row in rows)

    def speed(
        self,
        work: Work,
        rows: Sequence[Mapping[str, float]],
        waits: Sequence[float],
        ended: DeviceEvent,
        pauses: Sequence[tuple[DeviceEvent, DeviceEvent]] = (),
    ) -> Speed:
        """The speed of the steps of `rows` behind the one it was started after, without the time of `pauses`, to `ended`."""
        first = self.behind(rows)
        seconds = ended.since(self.started) - sum(end.since(began) for began, end in pauses)
        targets = [row.get("tokens", row["targets"]) for row in rows[first:]]
        batches = sum(1 / work.parts(int(row["step"])) for row in rows[first:])
        return speed(work, targets, waits[first:], seconds, batches)


def timed(source: Source[T], cursor: Cursor = None) -> Stream[T]:
    """The same items; each one's cursor is a `Position` with the seconds that its consumer waited for it."""
    stream, began = source(cursor), time.monotonic()
    for item, cursor in stream:
        yield item, Position(cursor, time.monotonic() - began)
        began = time.monotonic()
