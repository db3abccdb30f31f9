"""The batches of several ranks in step."""

from __future__ import annotations

from collections.abc import Callable
from signal import Signals as Signal

import attrs
import torch
import torch.distributed as dist

from fnrecipe.data import Batch, Cursor, Source, Stream
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.signals import Stopped


def in_lockstep(source: Source[Batch], cursor: Cursor = None, *, gang: Gang, word: Callable[[], int]) -> Stream[Batch]:
    """The batches of all ranks in step: until none of them has a row left, or the stream of one ends.

    Each item's cursor is a `Position`; `heard` is the greatest of what `word()` gave on any rank before it: all ranks see the
    same.

    Raises:
        Stopped: on all ranks, by the signal that `word()` gave on one whose stream it has ended.
    """
    stream = source(cursor)
    if gang.alone:
        yield from ((batch, attrs.evolve(position, heard=word())) for batch, position in stream)
        return
    entry = next(stream, None)
    while True:
        rows = entry is not None and bool(entry[0].mask.any())
        said = torch.tensor([rows, word(), entry is None], dtype=torch.int64)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=gang.control, async_op=True)
        following = None if entry is None else next(stream, None)
        assert work is not None
        work.wait()
        rows, heard, ended = said.tolist()
        if ended and heard:
            raise Stopped(Signal(heard))
        if ended or not rows:
            return
        assert entry is not None
        yield entry[0], attrs.evolve(entry[1], heard=heard)
        entry = following
