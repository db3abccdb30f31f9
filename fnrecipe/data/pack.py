"""Rows of one length from documents of any: cut only what is too long, put the pieces together by best fit.

A piece has at most length + 1 ids, and overlaps the next piece of its document by one: every prediction of a document
stands in exactly one row, and no prediction crosses from one document to another. On documents of real length
distributions (median about a quarter of a row), windows of 512 documents leave less than 0.5 % padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from fnrecipe.data.order import shuffled
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.data.tokenizer import Tokens

Row: TypeAlias = Sequence[Tokens]


def split(document: Tokens, length: int) -> list[Tokens]:
    """Pieces of at most `length` predictions; the document's bytes are dealt out in proportion, and add up exactly."""
    n = len(document.ids) - 1
    starts = range(0, n, length)
    share = [document.num_bytes * min(start, n) // max(n, 1) for start in (*starts, n)]
    return [
        Tokens(document.ids[start : start + length + 1], after - before, document.source)
        for start, (before, after) in zip(starts, pairwise(share), strict=True)
    ]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices of `sizes` in rows whose sums are at most `length`: best-fit decreasing, ties in order.

    The free spaces of the open rows are the bits of one integer, so the tightest fit is a shift and a lowest bit.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = defaultdict(list)
    free_bits = 0
    for index in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = sizes[index]
        fitting = free_bits >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_bits ^= 1 << free
            rows[row].append(index)
        else:
            free, row = length, len(rows)
            rows.append([index])
        left = free - size
        if left:
            open_rows[left].append(row)
            free_bits |= 1 << left
    return rows


def growing(limit: int, first: int = 32) -> Callable[[int], int]:
    """Windows that double from `first` to `limit` documents: the first rows come soon, the later ones fit well."""
    return lambda index: min(limit, first << min(index, 30))


def pack(documents: Sequence[Tokens], index: int, *, length: int, key: Sequence[int] | None) -> list[Row]:
    """The rows of one window of documents, in an order that depends on `key` and the window's `index`; None: as packed."""
    pieces = [piece for document in documents for piece in split(document, length)]
    rows: list[Row] = [[pieces[i] for i in row] for row in best_fit([len(piece.ids) - 1 for piece in pieces], length)]
    return rows if key is None else shuffled(rows, *key, index)


def concat(source: Source[Tokens], cursor: Cursor = None, *, length: int) -> Stream[Row]:
    """fairseq2's rule: documents end to end, cut where a row is full; the last token of each predicts the next one's first.

    A row is length + 1 tokens. A document that a row's end cuts goes on in the next row from the last token placed, so that
    it is a target there and an input here. Every piece counts its own positions. fairseq2 drops the last row if it is not
    full; here it is padded. Cursor: [upstream cursor before the document in hand, its tokens already used up].
    """
    before, used = cursor or (None, 0)
    parts: list[Tokens] = []
    room = length + 1
    for document, after in source(before):
        size = len(document.ids)
        while used < size:
            fill = min(size - used, room)
            counted = used + (not parts and used > 0)  # the token that a row repeats has been counted in the row before
            ends = max(counted - 1, 0), used + fill - 1  # predictions: a document's first token is none
            share = [document.num_bytes * end // max(size - 1, 1) for end in ends]
            parts.append(Tokens(document.ids[used : used + fill], share[1] - share[0], document.source))
            used, room = used + fill, room - fill
            if not room:
                used -= used < size
                yield _joined(parts), ((before, used) if used < size else (after, 0))
                parts, room = [], length + 1
        before, used = after, 0
    if row := _joined(parts):
        yield row, (before, 0)


def _joined(parts: Sequence[Tokens]) -> Row:
    """Parts of a flat row as pieces: each with the token that follows it, the last one without its last."""
    follow = [*(part.ids[:1] for part in parts[1:]), np.empty(0, np.int32)][: len(parts)]
    pieces = [Tokens(np.concatenate([p.ids, f]), p.num_bytes, p.source) for p, f in zip(parts, follow, strict=True)]
    return [piece for piece in pieces if len(piece.ids) > 1]  # a document's first token at the end is a target only
