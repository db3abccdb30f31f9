"""Documents to be scored: each of them once, every target in exactly one window of its document, and batches of windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import attrs
import numpy as np

from fnrecipe.data.batch import Array, Batch, collate
from fnrecipe.data.pack import best_fit
from fnrecipe.data.tokenizer import Tokens


@attrs.frozen(eq=False)
class Window:
    """Neighbouring tokens of a document.

    tokens    the tokens; `num_bytes` are those of the targets that are scored here
    context   how many of the first predictions are not scored here: they were in the window before
    is_first  whether the document begins here
    """

    tokens: Tokens
    context: int = 0
    is_first: bool = True


@attrs.frozen(eq=False)
class ScoredBatch:
    """A batch of windows, whose mask leaves out their context; and how many documents begin in each row, int64 [rows]."""

    batch: Batch
    documents: Array


def windows(document: Tokens, length: int, stride: int) -> list[Window]:
    """Windows of at most `length` predictions, each of which begins `stride` behind the one before; 1 <= stride <= length.

    Each prediction is scored in the first window that has it: with at least `length - stride` tokens of context before those of
    the prediction, or with all that its document has. The document's bytes are divided in proportion, and add up exactly.
    """
    n = len(document.ids) - 1
    starts = range(0, max(n - length, 0) + stride, stride)
    ends = [0, *(min(start + length, n) for start in starts)]
    share = [document.num_bytes * end // max(n, 1) for end in ends]
    return [
        Window(attrs.evolve(document, ids=document.ids[start : stop + 1], num_bytes=after - before), done - start, start == 0)
        for start, (done, stop), (before, after) in zip(starts, pairwise(ends), pairwise(share), strict=True)
    ]


def rows_of_windows(documents: Sequence[Tokens], index: int, *, length: int, stride: int, limit: int) -> list[Sequence[Window]]:
    """The windows of documents in rows of at most `length` predictions and `limit` windows, by best fit."""
    found = [window for document in documents for window in windows(document, length, stride)]
    return [[found[i] for i in row] for row in best_fit([len(window.tokens.ids) - 1 for window in found], length, limit)]


def collate_windows(rows: Sequence[Sequence[Window]], length: int) -> ScoredBatch:
    """A batch of rows of windows that have at most `length` predictions in all; an empty row is all padding."""
    batch = collate([[window.tokens for window in row] for row in rows], length)
    for mask, row in zip(batch.mask, rows, strict=True):
        start = 0
        for window in row:
            mask[start : start + window.context] = False
            start += len(window.tokens.ids) - 1
    return ScoredBatch(batch, np.array([sum(window.is_first for window in row) for row in rows], np.int64))
