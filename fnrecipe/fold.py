"""The fold: training as a generator of what a pure step makes of a stream."""

from __future__ import annotations

from collections.abc import Iterator

from fnrecipe.data import Cursor, Stream
from fnrecipe.step import Metrics, State, Step


def fold(step: Step, state: State, stream: Stream[object]) -> Iterator[tuple[State, Metrics, Cursor]]:
    """The state after each batch, the step's metrics, and the cursor from which the stream goes on.

    Under a step that donates its state, only the newest state is valid.
    """
    for batch, cursor in stream:
        state, metrics = step(state, batch)
        yield state, metrics, cursor
