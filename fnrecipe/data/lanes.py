"""Lanes: the equal parts of the global batch that processes share, whatever their number; and the readers that fill them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

import attrs

from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import UsageError

LAW = 3
"""The version of the order of the data: a cursor of another one means another place."""
_SHARE = 64 << 20
R = TypeVar("R")
B = TypeVar("B")


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

    def rows(self, number: int) -> int:
        """How many of `number` rows of the global batch are the process's."""
        return number // (self.world_size * self.workers)

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
    readers: Sequence[Source[R]],
    cursor: Cursor = None,
    *,
    num_lanes: int,
    rows_per_lane: int,
    collate: Callable[[Sequence[R]], B],
    padding: R,
    assignment: LaneAssignment = LaneAssignment(),
) -> Stream[B]:
    """This process's rows of the global batch: `collate` of those of its lanes, lane by lane.

    Each reader's rows go to neighbouring lanes, `rows_per_lane` to each in turn. A process runs the readers of its lanes; its
    stream ends with the last of them, while those of other processes may go on. An exhausted reader gives rows of `padding`,
    so shapes never change. Cursor: {reader: its cursor} and the version of all this, "law"; the process moves on those of its
    own readers and leaves the others as it found them. See `joint`.

    Raises:
        UsageError: if the lanes cannot be shared out evenly, or the readers are not those of the cursor.
    """
    mine, fed = assignment.lanes(num_lanes), num_lanes // len(readers)
    cursors = _cursors_of(cursor, len(readers))
    streams = {number: readers[number](cursors[number]) for number in sorted({lane // fed for lane in mine})}
    while True:
        rows: dict[int, list[R]] = {}
        given = False
        for number, stream in streams.items():
            entries = list(islice(stream, fed * rows_per_lane))
            rows[number] = [row for row, _ in entries] + [padding] * (fed * rows_per_lane - len(entries))
            cursors[number] = entries[-1][1] if entries else cursors[number]
            given = given or bool(entries)
        if not given:
            return
        starts = ((lane // fed, lane % fed * rows_per_lane) for lane in mine)
        chosen = [row for number, start in starts for row in rows[number][start : start + rows_per_lane]]
        yield collate(chosen), {"law": LAW, **{str(number): after for number, after in cursors.items()}}


def joint(start: Cursor, cursors: Iterable[Cursor]) -> Cursor:
    """The cursors of all processes as one, from which any number of processes goes on.

    `start` is the cursor that their streams started from. Each process has moved on, all of them to the same cursor; or it is a
    mapping, of which each moves on its own entries and leaves the others as they were at the start.

    Raises:
        UsageError: if two processes moved on the same thing in different ways.
    """
    first, *others = [cursor for cursor in cursors if cursor != start] or [start]
    apart = [other for other in others if other != first]
    if not apart:
        return first
    moved: dict[str, Cursor] = {}
    for cursor in (first, *apart):
        if not isinstance(cursor, dict):
            raise UsageError(f"stream: expected the same cursor of all processes, or mappings, found {first} and {apart[0]}")
        own = {name: after for name, after in cursor.items() if after != (start or {}).get(name)}
        for name in own.keys() & moved.keys():
            if own[name] != moved[name]:
                found = f"{moved[name]} and {own[name]}"
                raise UsageError(f"stream: expected the same cursor of all processes that move on {name!r}, found {found}")
        moved |= own
    return {**first, **moved}


def _cursors_of(cursor: Cursor, num_readers: int) -> dict[int, Cursor]:
    if cursor is None:
        return dict.fromkeys(range(num_readers))
    if cursor.get("law") != LAW:
        found = cursor.get("law", "one before there were versions")
        raise UsageError(f"the checkpoint's place in the data: expected version {LAW} of the order of the data, found {found}")
    names = [name for name in cursor if name != "law"]
    if set(names) != {str(number) for number in range(num_readers)}:
        expected = f"expected the readers of the checkpoint, {', '.join(names)}"
        raise UsageError(f"dataset.num_readers: {expected}, found {num_readers} of them")
    return {number: cursor[str(number)] for number in range(num_readers)}
