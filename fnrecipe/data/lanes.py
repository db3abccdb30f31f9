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
    """Where a process stands among those that share the lanes.

    rank, world_size   its number, and how many there are
    inner, turns       `inner` neighbouring ranks take pieces of the lanes in turn, `turns` times; 1 and 1: each takes one piece
    worker, workers    one of the processes that share what is the rank's
    """

    rank: int = 0
    world_size: int = 1
    inner: int = 1
    turns: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def alone(self) -> bool:
        """Whether no other process has lanes."""
        return self.world_size * self.workers == 1

    def lanes(self, number: int) -> list[int]:
        """The process's lanes among `number`, in the order of its rows.

        Raises:
            UsageError: if the lanes cannot be shared out evenly.
        """
        size, rest = divmod(number, self.world_size * self.turns)
        if rest:
            pieces = f"the world size {self.world_size}" + (f" times {self.turns} leaves a rank" if self.turns > 1 else "")
            raise UsageError(f"dataset.num_lanes: expected a multiple of {pieces}, found {number}")
        outer, inner = divmod(self.rank, self.inner)
        starts = [((outer * self.turns + turn) * self.inner + inner) * size for turn in range(self.turns)]
        lanes = [lane for start in starts for lane in range(start, start + size)]
        share, rest = divmod(len(lanes), self.workers)
        if rest:
            raise UsageError(f"dataset.num_lanes: expected {self.workers} equal parts of a rank's {len(lanes)} lanes")
        return lanes[self.worker * share : (self.worker + 1) * share]

    def split(self, workers: int) -> list[Place]:
        """The places of processes that share this one's lanes."""
        return [attrs.evolve(self, worker=worker, workers=workers) for worker in range(workers)]


def deal(
    lanes: Sequence[Source[Row]],
    cursor: Cursor = None,
    *,
    rows_per_lane: int,
    length: int,
    place: Place = Place(),
) -> Stream[Batch]:
    """This process's rows of the global batch: those of its lanes, lane by lane.

    An exhausted lane gives rows of padding, so shapes never change. Of one process the stream ends with its last lane; one of
    several goes on with padding, since others may have rows left: a batch that is empty on all ranks is the end.
    Cursor: {lane: its cursor}, of this rank's lanes; the ranks' cursors together, with null for a lane of a rank that never
    gave a batch, are one for any other world size.

    Raises:
        UsageError: if the lanes cannot be shared out evenly, or are not those of the cursor.
    """
    mine = place.lanes(len(lanes))
    cursors = _cursors_of(mine, cursor, len(lanes))
    streams = {lane: lanes[lane](cursors[str(lane)]) for lane in mine}
    while True:
        rows: list[Row] = []
        for lane, stream in streams.items():
            for _ in range(rows_per_lane):
                row, after = next(stream, ([], cursors[str(lane)]))
                rows.append(row)
                cursors[str(lane)] = after
        if not any(rows) and place.alone:
            return
        yield collate(rows, length), dict(cursors)


def _cursors_of(mine: Sequence[int], cursor: Cursor, num_lanes: int) -> dict[str, Cursor]:
    if cursor is None:
        return {str(lane): None for lane in mine}
    missing = [str(lane) for lane in mine if str(lane) not in cursor]
    unknown = [lane for lane in cursor if not (lane.isdigit() and int(lane) < num_lanes)]
    if missing or unknown:
        raise UsageError(
            f"dataset.num_lanes: expected the lanes of the checkpoint, {', '.join(cursor)}, found {num_lanes} lanes"
        )
    return {str(lane): cursor[str(lane)] for lane in mine}
