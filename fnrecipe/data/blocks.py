"""Blocks: the units of data that are put in order and dealt to lanes, and the source that reads them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.stream import Cursor, Stream, T

MAX_BLOCK_BYTES = 1 << 20
_BLOCKS_PER_LANE = 16


@attrs.frozen
class Block:
    """The records of a file that start in [start, stop), in its format's unit; of these every `stripes`-th from `stripe`.

    Stripes share out what cannot be entered in the middle: whoever reads one decodes all of them.
    """

    path: str
    start: int
    stop: int
    stripe: int = 0
    stripes: int = 1


@attrs.frozen(eq=False)
class Blocks(Sequence[Block]):
    """Many blocks in little memory: `table` int64 [blocks, 5] holds number of the path, start, stop, stripe, stripes."""

    paths: Sequence[str]
    table: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        path, *numbers = self.table[index].tolist()
        return Block(self.paths[path], *numbers)

    def take(self, order: NDArray[np.int64] | slice) -> Blocks:
        """Those blocks, in that order."""
        return Blocks(self.paths, self.table[order])


def blocks_of(blocks: Iterable[Block]) -> Blocks:
    """The same blocks as a table."""
    listed = list(blocks)
    paths = {path: number for number, path in enumerate(dict.fromkeys(block.path for block in listed))}
    rows = [(paths[b.path], b.start, b.stop, b.stripe, b.stripes) for b in listed]
    return Blocks(list(paths), np.array(rows, np.int64).reshape(-1, 5))


def cut(paths: Sequence[str], sizes: Sequence[int], num_lanes: int, limit: int = MAX_BLOCK_BYTES) -> Blocks:
    """Files of `sizes` units as blocks of `limit` units: of fewer, a power of two, if lanes would get less than 16 blocks."""
    share = max(sum(sizes) // (_BLOCKS_PER_LANE * num_lanes), 1)
    step = min(limit, 1 << (share.bit_length() - 1))
    tables = []
    for number, size in enumerate(sizes):
        starts = np.arange(0, size, step)
        rest = (np.minimum(starts + step, size), np.zeros_like(starts), np.ones_like(starts))
        tables.append(np.stack([np.full_like(starts, number), starts, *rest], 1))
    return Blocks(paths, np.concatenate([np.empty((0, 5), np.int64), *tables]))


def stripe(blocks: Blocks, num_lanes: int) -> Blocks:
    """The same records in at least one block a lane: each block in so many stripes if there are fewer blocks than lanes."""
    stripes = max(-(-num_lanes // max(len(blocks), 1)), 1)
    table = np.repeat(blocks.table, stripes, 0)
    table[:, 3], table[:, 4] = np.tile(np.arange(stripes), len(blocks)), stripes
    return Blocks(blocks.paths, table)


def points(paths: Sequence[str], starts: Sequence[NDArray[np.int64]]) -> Blocks:
    """A block for each record, by the places at which the records of each file start."""
    number = np.repeat(np.arange(len(paths)), [len(s) for s in starts])
    start = np.concatenate([np.empty(0, np.int64), *starts])
    return Blocks(paths, np.stack([number, start, start + 1, np.zeros_like(start), np.ones_like(start)], 1))


def read_blocks(cursor: Cursor = None, *, blocks: Sequence[Block], read: Callable[[Block], Iterator[T]]) -> Stream[T]:
    """The items of `read(block)` for one block after another. Cursor: [number of the block, items given of it].

    Going on inside a block reads it again from its start: a mebibyte, say, wherever it lies.
    """
    first, given = cursor or (0, 0)
    for number in range(first, len(blocks)):
        for count, item in enumerate(islice(read(blocks[number]), given, None), given + 1):
            yield item, (number, count)
        given = 0
