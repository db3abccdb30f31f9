"""Lanes: the fixed logical streams that the global batch is made of, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from fnrecipe.data.batch import Batch, collate
from fnrecipe.data.pack import Row
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import UsageError


@attrs.frozen
class Place:
    """Where a process stands in the gang: rank 0 … world_size - 1."""

    rank: int = 0
    world_size: int = 1


def deal(
    lanes: Sequence[Source[Row]],
    cursor: Cursor = None,
    *,
    rows_per_lane: int,
    length: int,
    place: Place = Place(),
) -> Stream[Batch]:
    """This rank's rows of the global batch: those of its `len(lanes) / world_size` neighbouring lanes, lane by lane.

    An exhausted lane gives rows of padding, so shapes never change. On one rank the stream ends with its last lane; one of
    several ranks goes on with padding, since others may have rows left: a batch that is empty on all ranks is the end.
    Cursor: {lane: its cursor}, of this rank's lanes; the ranks' cursors together, with null for a lane of a rank that never
    gave a batch, are one for any other world size.

    Raises:
        UsageError: if the lanes cannot be shared out evenly, or are not those of the cursor.
    """
    if len(lanes) % place.world_size:
        raise UsageError(f"dataset.num_lanes: expected a multiple of the world size {place.world_size}, found {len(lanes)}")
    share = len(lanes) // place.world_size
    mine = range(place.rank * share, (place.rank + 1) * share)
    cursors = _cursors_of(mine, cursor, len(lanes))
    streams = {lane: lanes[lane](cursors[str(lane)]) for lane in mine}
    while True:
        rows: list[Row] = []
        for lane, stream in streams.items():
            for _ in range(rows_per_lane):
                row, after = next(stream, ([], cursors[str(lane)]))
                rows.append(row)
                cursors[str(lane)] = after
        if not any(rows) and place.world_size == 1:
            return
        yield collate(rows, length), dict(cursors)


def _cursors_of(mine: range, cursor: Cursor, num_lanes: int) -> dict[str, Cursor]:
    if cursor is None:
        return {str(lane): None for lane in mine}
    missing = [str(lane) for lane in mine if str(lane) not in cursor]
    unknown = [lane for lane in cursor if not (lane.isdigit() and int(lane) < num_lanes)]
    if missing or unknown:
        raise UsageError(
            f"dataset.num_lanes: expected the lanes of the checkpoint, {', '.join(cursor)}, found {num_lanes} lanes"
        )
    return {str(lane): cursor[str(lane)] for lane in mine}
