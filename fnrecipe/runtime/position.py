"""The cursor of the training stream, with what its stages learned on the way."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from fnrecipe.data import Cursor


@attrs.frozen
class Position:
    """Where a batch stands in the training stream.

    cursor  from which the data goes on behind the batch
    waited  seconds that the consumer waited for the batch
    heard   number of the signal that any rank heard before the batch; 0: none
    clock   seconds since the run began, by rank 0's clock, before the batch
    busy    seconds by rank, that each was at work in the step before and waited for the batch; none in a gang of one
    """

    cursor: Cursor
    waited: float = 0.0
    heard: int = 0
    clock: float = 0.0
    busy: Sequence[float] = ()
