"""Observers: what a run does beside training, as stages behind the fold.

The fold gives ticks: one for the state that a run begins with, one for each step, and one at the end. An observer is a
generator function from ticks to the same ticks. Observers run in the order in which they are composed; code after a `yield`
runs once all later observers are done with that tick.

    from fnrecipe.parallel.global_norm import global_norm  # parameters are shards, also on one rank

    def watched(ticks):                                     # a user's own observer
        for tick in ticks:
            if tick.number % 100 == 0:
                print(tick.number, global_norm(tick.state.params).item())
            yield tick

A step that donates its state writes the next state into the same buffers. So an observer may copy tensors out of
`tick.state`, and must not keep it: the state of an earlier tick cannot be asked for, and one that was kept is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import attrs

from fnrecipe.data import Cursor
from fnrecipe.step import Metrics, State


@attrs.frozen(eq=False)
class Tick:
    """A moment between two steps, and what is due then.

    number    steps taken
    cursor    from which the stream goes on
    metrics   those of the step; None in the first tick and in the last one
    waited    seconds that the step waited for data
    busy      those that each rank was at work in the step before, and waited for the data of this one
    stop      number of the signal that ends the run here
    publish, save, evaluate   whether metrics are to be written, the state to be saved, the evaluations to be made
    last      whether this is the tick at the end, which repeats the newest state
    """

    number: int
    cursor: Cursor
    metrics: Metrics | None = None
    waited: float = 0.0
    stop: int | None = None
    publish: bool = False
    save: bool = False
    evaluate: bool = False
    last: bool = False
    busy: Sequence[float] = ()
    _states: list[State] = attrs.field(factory=list, kw_only=True, repr=False)

    @property
    def state(self) -> State:
        """The state after step `number`.

        Raises:
            RuntimeError: once the run has gone on: the buffers hold a newer state.
        """
        if not self._states:
            raise RuntimeError(f"the state of step {self.number} is gone: the run has gone on from it")
        return self._states[0]

    def forget(self) -> None:
        """Gives up the state, before the next step overwrites it."""
        self._states.clear()


Ticks: TypeAlias = Iterator[Tick]
Observer: TypeAlias = Callable[[Ticks], Ticks]


def observed(ticks: Ticks, *observers: Observer) -> Tick:
    """The last tick, after all observers have seen all ticks."""
    for observer in observers:
        ticks = observer(ticks)
    (last,) = deque(ticks, maxlen=1)
    return last
