"""Packing: rows of one length from documents of any length, by best fit over windows of documents.

Only documents longer than a row are cut. A piece has at most length + 1 ids and overlaps the next piece of its document by
one: every prediction of a document is in exactly one row, and none crosses from one document to another. On documents of real
length distributions (median about a quarter of a row), windows of 512 documents leave less than 0.5 % padding.

A row may be bounded in its pieces, too: kernels for ragged rows want that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import attrs
import numpy as np

from fnrecipe.data.order import shuffled
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.data.tokenizer import Tokens

Row: TypeAlias = Sequence[Tokens]
_MANY_ROWS = 256


def split(document: Tokens, length: int) -> list[Tokens]:
    """Pieces of at most `length` predictions; the document's bytes are divided in proportion, and add up exactly."""
    n = len(document.ids) - 1
    starts = range(0, n, length)
    share = _byte_shares(document, (*starts, n))
    return [
        attrs.evolve(piece, num_bytes=after - before, lost=0)
        for start, (before, after) in zip(starts, pairwise(share), strict=True)
        for piece in [_part(document, start, start + length + 1)]
    ]


def _part(document: Tokens, start: int, stop: int) -> Tokens:
    """The tokens of a range, with the bytes of all."""
    trained = None if document.trained is None else document.trained[start:stop]
    return attrs.evolve(document, ids=document.ids[start:stop], trained=trained)


def _byte_shares(document: Tokens, ends: Sequence[int]) -> list[int]:
    """The bytes of the first 0, 1, … predictions, as `ends` numbers them: in proportion to those that are trained."""
    n = len(document.ids) - 1
    if document.trained is None:
        return [document.num_bytes * min(end, n) // max(n, 1) for end in ends]
    count = [0, *np.cumsum(document.trained[1:]).tolist()]
    return [document.num_bytes * count[min(end, n)] // max(count[-1], 1) for end in ends]


def best_fit(sizes: Sequence[int], length: int, limit: int | None = None, opened: Sequence[int] = ()) -> list[list[int]]:
    """Indices of `sizes` in rows of at most `limit` whose sums are at most `length`: best-fit decreasing, ties in order.

    If there are sizes `opened`, the first row already holds these.
    """
    # Best-fit decreasing: largest first, each into the open row that it leaves the least space in. Bit f of `free_bits` says
    # whether a row with f free positions is open; so the tightest fit is the lowest bit at or above `size`, without a search.
    # The sort is stable and rows are reused last in, first out: the result depends on `sizes` alone.
    rows: list[list[int]] = []
    counts: list[int] = []
    open_rows: dict[int, list[int]] = defaultdict(list)
    free_bits = 0

    def leave(row: int, free: int) -> int:
        """`free_bits` with a row that has `free` positions left, unless it may not hold more."""
        if not free or (limit is not None and counts[row] >= limit):
            return free_bits
        open_rows[free].append(row)
        return free_bits | 1 << free

    if opened:
        rows, counts = [[]], [len(opened)]
        free_bits = leave(0, length - sum(opened))
    for index in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = sizes[index]
        fitting = free_bits >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_bits ^= 1 << free
            rows[row].append(index)
            counts[row] += 1
        else:
            free, row = length, len(rows)
            rows.append([index])
            counts.append(1)
        free_bits = leave(row, free - size)
    return rows


def growing(limit: int, times: int = 1, first: int = 32) -> Callable[[int], int]:
    """Window sizes that double from `first` to `limit` documents, times `times`: early rows come soon, later ones fit well."""
    return lambda index: times * min(limit, first << min(index, 30))


def fills_an_epoch(documents: Sequence[Tokens], following: Tokens, *, length: int) -> bool:
    """Whether a window may be packed without waiting for more documents: it has many rows, and behind it an epoch begins.

    A file of a book is one document. A window of hundreds of documents would be that book as many times, each of them read,
    tokenised and cut before the first row is there; and epochs are packed one after the other in any case. The row that
    stays open at the end is at most one of `_MANY_ROWS`.
    """
    epoch = next((document.epoch for document in documents if document.source == following.source), following.epoch)
    return epoch != following.epoch and _size(documents) >= _MANY_ROWS * length


def pack(
    documents: Sequence[Tokens], index: int, *, length: int, limit: int | None = None, key: Sequence[int] | None
) -> list[Row]:
    """The rows of one window of documents, in an order that depends on `key` and the window's `index`; None: as packed.

    No row of a source's next epoch comes before a row of its previous one: no document is used again before all others were.
    """
    # A window may hold the end of one epoch of a source and the start of the next, so its epochs are packed and shuffled one
    # after the other. To end a row at each epoch's end would leave an epoch of a few tokens mostly padding (two documents of
    # 20 tokens in a row of 1024: 96 %). So the emptiest row of each epoch stays open, comes last, and is filled up by the
    # next epoch: 9.5 % padding in that case, and nothing measurable in others.
    done: list[Row] = []
    rows: list[Row] = []  # of the current epoch
    for number, epoch in enumerate(_epochs(documents)):
        opened = [rows.pop(min(range(len(rows)), key=lambda i: _size(rows[i])))] if rows else []
        done += rows
        pieces = [piece for document in epoch for piece in split(document, length)]
        packed = best_fit(_sizes(pieces), length, limit, _sizes(opened[0]) if opened else ())
        found = [[pieces[i] for i in row] for row in packed]
        first: list[Row] = [[*row, *more] for row, more in zip(opened, found, strict=False)]
        others: list[Row] = [*found[len(opened) :]]
        rows = others if key is None else shuffled(others, *key, index, number)
        if rows:
            done += first
        else:
            rows = first
    return done + rows


def _epochs(documents: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """The documents in order, divided where a source begins a new epoch."""
    epoch: list[Tokens] = []
    seen: dict[int, int] = {}
    for document in documents:
        if seen.setdefault(document.source, document.epoch) != document.epoch:
            yield epoch
            epoch, seen = [], {document.source: document.epoch}
        epoch.append(document)
    yield epoch


def _size(row: Row) -> int:
    return sum(_sizes(row))


def _sizes(row: Row) -> list[int]:
    return [len(piece.ids) - 1 for piece in row]


def concat(source: Source[Tokens], cursor: Cursor = None, *, length: int, limit: int | None = None) -> Stream[Row]:
    """fairseq2's rule: documents end to end, cut where a row is full; the last token of each predicts the next one's first.

    A row is length + 1 tokens. A document that is cut continues in the next row with the last token of this one, which is a
    target here and an input there. Positions begin at 0 in every piece. fairseq2 drops the last row if it is not full; here
    it is padded, as is a row that holds `limit` pieces before it is full. Cursor: [upstream cursor before the current
    document, how many of its tokens are in rows already].
    """
    before, used = cursor or (None, 0)
    parts: list[Tokens] = []
    room = length + 1
    for document, after in source(before):
        size = len(document.ids)
        while used < size:
            fill = min(size - used, room)
            counted = used + (not parts and used > 0)  # a repeated token counted in the row before
            ends = max(counted - 1, 0), used + fill - 1  # predictions; of a document's first token there is none
            share = _byte_shares(document, ends)
            parts.append(attrs.evolve(_part(document, used, used + fill), num_bytes=share[1] - share[0]))
            used, room = used + fill, room - fill
            if not room or len(parts) == limit:
                used -= used < size
                if row := _joined(parts):
                    yield row, ((before, used) if used < size else (after, 0))
                parts, room = [], length + 1
        before, used = after, 0
    if row := _joined(parts):
        yield row, (before, 0)


def _joined(parts: Sequence[Tokens]) -> Row:
    """Parts of a flat row as pieces, each with the token that follows it in the row as its last target."""
    follow = [*(_part(part, 0, 1) for part in parts[1:]), _part(parts[-1], 0, 0)] if parts else []
    pieces = [_followed(*both) for both in zip(parts, follow, strict=True)]
    return [piece for piece in pieces if len(piece.ids) > 1]  # a document's first token at the end is a target only


def _followed(part: Tokens, by: Tokens) -> Tokens:
    masks = [np.ones(len(p.ids), np.bool_) if p.trained is None else p.trained for p in (part, by)]
    trained = None if part.trained is by.trained is None else np.concatenate(masks)
    return attrs.evolve(part, ids=np.concatenate([part.ids, by.ids]), trained=trained)
