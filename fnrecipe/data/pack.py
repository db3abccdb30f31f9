"""Rows of one length from documents of any: cut only what is too long, put the pieces together by best fit.

A piece has at most length + 1 ids, and overlaps the next piece of its document by one: every prediction of a document
stands in exactly one row, and no prediction crosses from one document to another. On documents of real length
distributions (median about a quarter of a row), windows of 512 documents leave less than 0.5 % padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from fnrecipe.data.order import shuffled
from fnrecipe.data.tokenizer import Tokens

Row: TypeAlias = Sequence[Tokens]


def split(document: Tokens, length: int) -> list[Tokens]:
    """Pieces of at most `length` predictions; the document's bytes are dealt out in proportion, and add up exactly."""
    n = len(document.ids) - 1
    starts = range(0, n, length)
    share = [document.num_bytes * min(start, n) // max(n, 1) for start in (*starts, n)]
    return [
        Tokens(document.ids[start : start + length + 1], after - before)
        for start, (before, after) in zip(starts, pairwise(share), strict=True)
    ]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices of `sizes` in rows whose sums are at most `length`: best-fit decreasing, ties in order.

    The free spaces of the open rows are the bits of one integer, so the tightest fit is a shift and a lowest bit.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
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


def pack(documents: Sequence[Tokens], index: int, *, length: int, key: Sequence[int]) -> list[Row]:
    """The rows of one window of documents, in an order that depends on `key` and the window's `index`."""
    pieces = [piece for document in documents for piece in split(document, length)]
    rows = best_fit([len(piece.ids) - 1 for piece in pieces], length)
    return shuffled([[pieces[i] for i in row] for row in rows], *key, index)
