"""Which rank lets the others wait: how long each is at work in its steps, without what it waits for the others there."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

import attrs

from fnrecipe.runtime.clock import work_seconds
from fnrecipe.step import Metrics, State, Step
from fnrecipe.tree import Tree

MUCH = 1.5
"""A rank that is at work so many times as long as the median of ranks is a straggler, …"""
SHARE = 0.1
"""… if what it takes more is this share of a step at least."""
_log = logging.getLogger(__name__)


class StepWork:
    """Seconds that this rank was at work in its steps since it was asked last; the first one, which is traced, does not count.

    It is the time of the thread on the host: on a GPU, that in which it gives the device its work.
    """

    # In a step all ranks end at the same time, as each waits in the collectives for the slowest one. A thread that waits there
    # is asleep. So its time without sleep tells who is slow, without a clock around each collective of a compiled step.

    def __init__(self) -> None:
        self._seconds: float | None = None

    def counted(self, step: Step) -> Step:
        """The same step, whose work is counted."""

        def call(state: State, batch: Tree) -> tuple[State, Metrics]:
            began = work_seconds()
            result = step(state, batch)
            self._seconds = 0.0 if self._seconds is None else self._seconds + work_seconds() - began
            return result

        return call

    def take(self) -> float:
        """The seconds since the last call."""
        if self._seconds is None:
            return 0.0
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@attrs.frozen
class Slowest:
    """The rank that was at work longest, its seconds a step, and those of the median of all ranks."""

    rank: int
    seconds: float
    median: float


def slowest(busy: Sequence[Sequence[float]]) -> Slowest | None:
    """Which rank was the slowest in steps of which `busy` has the seconds by rank; None where there are no others."""
    steps = [seconds for seconds in busy if seconds]
    if not steps:
        return None
    means = [sum(seconds) / len(steps) for seconds in zip(*steps, strict=True)]
    rank = max(range(len(means)), key=means.__getitem__)
    return Slowest(rank, means[rank], statistics.median_low(means))


def tell_straggler(found: Slowest, step_seconds: float) -> None:
    """Warns, once a rank, of one that is much slower than the median, where a step takes so many seconds."""
    if found.seconds > MUCH * found.median and found.seconds - found.median > SHARE * step_seconds:
        _log.warning(
            "rank %d is at work for %.3g s of a step, the median of ranks for %.3g s, and the others wait for it "
            "(perf/slowest_rank in logs/perf.jsonl)",
            found.rank,
            found.seconds,
            found.median,
            extra={"once": f"straggler {found.rank}"},
        )
