"""Blocks: ranges of files that are shuffled and dealt to readers, and the source that reads them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.order import permutation
from fnrecipe.data.stream import Cursor, Stream, T

MAX_BLOCK_BYTES, _MIN_BLOCK_BYTES = 1 << 20, 1 << 10
ENOUGH_BLOCKS = 64


@attrs.frozen
class Block:
    """The records of a file that start in [start, stop), in its format's unit; of these every `stripes`-th from `stripe` on.

    Stripes divide a file that cannot be entered in the middle: a reader of one decodes the others, too.
    """

    path: str
    start: int
    stop: int
    stripe: int = 0
    stripes: int = 1


@attrs.frozen(eq=False)
class Blocks(Sequence[Block]):
    """A sequence of blocks as a table: 48 bytes a block.

    paths   of the files
    table   int64 [blocks, 5]: index of the path, start, stop, stripe, stripes
    sizes   int64 [blocks]: bytes on disk, or another measure of the work in each block
    single  whether each block is one document, which cannot be divided into stripes
    """

    paths: Sequence[str]
    table: NDArray[np.int64]
    sizes: NDArray[np.int64]
    single: bool = False

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        path, *numbers = self.table[index].tolist()
        return Block(self.paths[path], *numbers)

    def take(self, order: NDArray[np.int64] | slice) -> Blocks:
        """The blocks at these indices, in this order."""
        return attrs.evolve(self, table=self.table[order], sizes=self.sizes[order])


def blocks_of(blocks: Iterable[Block], sizes: Sequence[int], *, single: bool = False) -> Blocks:
    """The same blocks as a table."""
    listed = list(blocks)
    paths = {path: number for number, path in enumerate(dict.fromkeys(block.path for block in listed))}
    rows = [(paths[b.path], b.start, b.stop, b.stripe, b.stripes) for b in listed]
    return Blocks(list(paths), np.array(rows, np.int64).reshape(-1, 5), np.array(sizes, np.int64), single)


def cut(paths: Sequence[str], sizes: Sequence[int], limit: int = MAX_BLOCK_BYTES) -> Blocks:
    """Files of `sizes` units as blocks of `limit` units; of a smaller power of two, down to 1024, if that makes 64 blocks."""
    share = max(sum(sizes) // ENOUGH_BLOCKS, _MIN_BLOCK_BYTES)
    step = min(limit, 1 << (share.bit_length() - 1))
    tables = []
    for number, size in enumerate(sizes):
        starts = np.arange(0, size, step)
        rest = (np.minimum(starts + step, size), np.zeros_like(starts), np.ones_like(starts))
        tables.append(np.stack([np.full_like(starts, number), starts, *rest], 1))
    table = np.concatenate([np.empty((0, 5), np.int64), *tables])
    return Blocks(paths, table, table[:, 2] - table[:, 1])


def points(paths: Sequence[str], starts: Sequence[NDArray[np.int64]]) -> Blocks:
    """A block for each record, from the offsets at which the records of each file start."""
    number = np.repeat(np.arange(len(paths)), [len(s) for s in starts])
    start = np.concatenate([np.empty(0, np.int64), *starts])
    table = np.stack([number, start, start + 1, np.zeros_like(start), np.ones_like(start)], 1)
    return Blocks(paths, table, np.ones_like(start), single=True)


def share(blocks: Blocks, number: int, size: int, key: Sequence[int] | None) -> Blocks:
    """Part `number` of `size` parts of the blocks, dealt by `key`; None: in the order of the blocks.

    The parts together hold each document once. Their sizes differ by no more than the largest block.
    """
    # A few large blocks (compressed files, say) cannot be dealt evenly. Then each part is one stripe of every block: its
    # reader decodes all of them and uses one document in `size`. The first stripe is turned from block to block, or the part
    # with the first document of each block would always be the same.
    if size == 1:
        return blocks
    if _striped(blocks, size):
        table = blocks.table.copy()
        turn = np.zeros(len(blocks), np.int64) if key is None else permutation(len(blocks) * size, *key)[: len(blocks)]
        table[:, 3], table[:, 4] = (number + turn) % size, size
        return attrs.evolve(blocks, table=table, sizes=blocks.sizes // size)
    if key is None:
        return blocks.take(slice(number, None, size))
    order, part = _dealt(blocks, size, key)
    return blocks.take(order[part == number])


def unevenness(blocks: Blocks, size: int) -> float:
    """By how much the largest of `size` parts exceeds their mean, as a fraction of the mean."""
    if not blocks.sizes.any() or _striped(blocks, size):
        return 0.0
    order, part = _dealt(blocks, size, ())
    sums = np.bincount(part, blocks.sizes[order], size)
    return float(sums.max() / sums.mean()) - 1


def _striped(blocks: Blocks, size: int) -> bool:
    return len(blocks) < ENOUGH_BLOCKS * size and not blocks.single


def _dealt(blocks: Blocks, size: int, key: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The indices of the blocks, largest first, and the part that each goes to: 0, 1, 2, 2, 1, 0, 0, 1, 2, … for three."""
    # Why the parts are even: take two of them. In each turn one gets the larger block, by the distance between two sizes in
    # the descending list. The distances of different turns are disjoint intervals of that list, so their sum, whatever the
    # signs, is at most the largest size. Blocks of equal size are in an order that depends on `key`.
    order = permutation(len(blocks), *key)
    order = order[np.argsort(-blocks.sizes[order], kind="stable")]
    turn, place = np.divmod(np.arange(len(blocks)), size)
    return order, np.where(turn % 2 == 1, size - 1 - place, place)


def read_blocks(cursor: Cursor = None, *, blocks: Sequence[Block], read: Callable[[Block], Iterator[T]]) -> Stream[T]:
    """The items of `read(block)` for one block after another. Cursor: [index of the block, items yielded from it].

    Resuming inside a block reads the block again from its start.
    """
    # The cursor counts items, not bytes: so every format reads a block as a plain generator, a token cache does not change
    # cursors, and any cursor can be resumed on changed data. The price is at most a block, a mebibyte, read twice.
    first, skipped = cursor or (0, 0)
    for number in range(first, len(blocks)):
        for count, item in enumerate(islice(read(blocks[number]), skipped, None), skipped + 1):
            yield item, (number, count)
        skipped = 0
