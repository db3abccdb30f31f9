"""The batches of several ranks in step."""

from __future__ import annotations

from collections.abc import Callable
from signal import Signals as Signal

import attrs
import torch
import torch.distributed as dist

from fnrecipe.data.stream import Cursor, Source, Stream, T
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.signals import Stopped


def in_lockstep(
    source: Source[T | None],
    cursor: Cursor = None,
    *,
    gang: Gang,
    padding: T,
    word: Callable[[], int] = int,
    clock: Callable[[], float] = float,
    busy: Callable[[], float] = float,
) -> Stream[T]:
    """The batches of all ranks in step, until none of them has one; `padding` for None, of a rank that has none left.

    Each item's cursor is a `Position`; `heard` is the greatest of what `word()` gave on any rank before it, and `clock` is what
    `clock()` gave on rank 0, in milliseconds; `busy` has what `busy()` gave on each rank, with what that rank waited for the
    batch, in microseconds: all ranks see the same.

    Raises:
        Stopped: on all ranks, by the signal that `word()` gave on one whose stream it has ended.
    """
    stream = source(cursor)
    if gang.alone:
        for batch, position in stream:
            if batch is None:
                return
            yield batch, attrs.evolve(position, heard=word(), clock=clock())
        return
    entry = next(stream, None)
    while True:
        there = entry is not None and entry[0] is not None
        now = int(1000 * clock()) if gang.leads else 0
        mine = busy() + (0.0 if entry is None else entry[1].waited)
        work_of = [int(1e6 * mine) if rank == gang.rank else 0 for rank in range(gang.size)]
        said = torch.tensor([there, word(), entry is None, now, *work_of], dtype=torch.int64)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=gang.control, async_op=True)
        following = None if entry is None else next(stream, None)
        assert work is not None
        work.wait()
        any_there, heard, ended, now, *work_of = said.tolist()
        if ended and heard:
            raise Stopped(Signal(heard))
        if ended or not any_there:
            return
        assert entry is not None
        batch, position = entry
        yield (
            padding if batch is None else batch,
            attrs.evolve(position, heard=heard, clock=now / 1000, busy=[each / 1e6 for each in work_of]),
        )
        entry = following
