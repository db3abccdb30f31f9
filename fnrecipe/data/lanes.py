"""Lanes: the equal parts of the global batch that processes share, whatever their number; and the readers that fill them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import attrs

from fnrecipe.data.batch import Batch, collate
from fnrecipe.data.pack import Row
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import UsageError

LAW = 2
"""The version of the order of the data: a cursor of another one means another place."""
_SHARE = 64 << 20


@attrs.frozen
class LaneAssignment:
    """Where a process stands among those that share the lanes.

    rank, world_size    its number, and how many there are
    interleave, rounds  neighbouring ranks that take pieces of the lanes in turn, and how often; 1 and 1: a piece each
    worker, workers     one of the processes that share what is the rank's
    """

    rank: int = 0
    world_size: int = 1
    interleave: int = 1
    rounds: int = 1
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
        size, rest = divmod(number, self.world_size * self.rounds)
        if rest:
            pieces = f"the world size {self.world_size}" + (
                f" times {self.rounds} microbatches a rank" if self.rounds > 1 else ""
            )
            raise UsageError(f"dataset.num_lanes: expected a multiple of {pieces}, found {number}")
        outer, inner = divmod(self.rank, self.interleave)
        starts = [((outer * self.rounds + turn) * self.interleave + inner) * size for turn in range(self.rounds)]
        lanes = [lane for start in starts for lane in range(start, start + size)]
        share, rest = divmod(len(lanes), self.workers)
        if rest:
            raise UsageError(f"dataset.num_lanes: expected {self.workers} equal parts of a rank's {len(lanes)} lanes")
        return lanes[self.worker * share : (self.worker + 1) * share]

    def split(self, workers: int) -> list[LaneAssignment]:
        """The places of processes that share this one's lanes."""
        return [attrs.evolve(self, worker=worker, workers=workers) for worker in range(workers)]


def readers_for(num_bytes: int, num_lanes: int) -> int:
    """How many readers share data of so many bytes: as many as have 64 MiB each, a divisor of the number of lanes.

    What one reader reads is in one order, and so used evenly to the document; but every process that has some of its lanes
    reads all of it. 64 MiB are read in seconds.
    """
    return max(size for size in range(1, num_lanes + 1) if num_lanes % size == 0 and (size == 1 or num_bytes >= size * _SHARE))


def batch_lanes(
    readers: Sequence[Source[Row]],
    cursor: Cursor = None,
    *,
    num_lanes: int,
    rows_per_lane: int,
    length: int,
    assignment: LaneAssignment = LaneAssignment(),
) -> Stream[Batch]:
    """This process's rows of the global batch: those of its lanes, lane by lane.

    Each reader's rows go to neighbouring lanes, `rows_per_lane` to each in turn. A process runs the readers of its lanes. An
    exhausted reader gives rows of padding, so shapes never change. Of one process the stream ends with its last reader; one
    of several goes on with padding, since others may have rows left: a batch that is empty on all ranks is the end.
    Cursor: {reader: its cursor}, of this process's readers, and the version of all this, "law"; see `joint`.

    Raises:
        UsageError: if the lanes cannot be shared out evenly, or the readers are not those of the cursor.
    """
    mine, fed = assignment.lanes(num_lanes), num_lanes // len(readers)
    cursors = _cursors_of({lane // fed for lane in mine}, cursor, len(readers))
    streams = {number: readers[number](after) for number, after in cursors.items()}
    while True:
        rows: dict[int, list[Row]] = {}
        for number, stream in streams.items():
            entries = list(islice(stream, fed * rows_per_lane))
            rows[number] = [row for row, _ in entries] + [[]] * (fed * rows_per_lane - len(entries))
            cursors[number] = entries[-1][1] if entries else cursors[number]
        starts = ((lane // fed, lane % fed * rows_per_lane) for lane in mine)
        chosen = [row for number, start in starts for row in rows[number][start : start + rows_per_lane]]
        if not any(chosen) and assignment.alone:
            return
        yield collate(chosen, length), {"law": LAW, **{str(number): after for number, after in cursors.items()}}


def joint(cursors: Iterable[Mapping[str, Cursor]]) -> dict[str, Cursor]:
    """The cursors of all processes as one, from which any number of processes goes on."""
    whole = {name: after for cursor in cursors for name, after in cursor.items()}
    return {"law": whole.pop("law"), **{name: whole[name] for name in sorted(whole, key=int)}}


def _cursors_of(mine: Iterable[int], cursor: Cursor, num_readers: int) -> dict[int, Cursor]:
    if cursor is None:
        return dict.fromkeys(sorted(mine))
    if cursor.get("law") != LAW:
        found = cursor.get("law", "one before there were versions")
        raise UsageError(f"the checkpoint's place in the data: expected version {LAW} of the order of the data, found {found}")
    names = [name for name in cursor if name != "law"]
    known, needed = {str(number) for number in range(num_readers)}, {str(number) for number in mine}
    if not needed <= set(names) <= known:
        expected = f"expected the readers of the checkpoint, {', '.join(names)}"
        raise UsageError(f"dataset.num_readers: {expected}, found {num_readers} of them")
    return {number: cursor[str(number)] for number in sorted(mine)}
