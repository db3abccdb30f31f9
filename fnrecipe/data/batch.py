"""Batches of packed rows of tokens, of static shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np

from fnrecipe.data.pack import Row

Array: TypeAlias = Any
"""A NumPy array, or the tensor that was made of it: nothing here imports torch."""


@attrs.frozen(eq=False)
class Batch:
    """Packed rows: arrays (or tensors) [rows, length], and [rows] for `num_bytes`.

    tokens     int64  inputs; 0 where the row is padding
    targets    int64  the token that follows each input in its document
    segments   int64  number of the piece within its row, from 0; -1 where the row is padding
    positions  int64  position within the piece, from 0
    sources    int64  number of the source that the piece comes from; -1 where the row is padding
    mask       bool   whether there is a target that is trained
    num_bytes  int64  bytes of text that the targets of the row's mask stand for
    """

    tokens: Array
    targets: Array
    segments: Array
    positions: Array
    sources: Array
    mask: Array
    num_bytes: Array


def collate(rows: Sequence[Row], length: int) -> Batch:
    """A batch of rows whose pieces have at most `length` predictions in all; an empty row is all padding."""
    shape = len(rows), length
    tokens, targets, positions = (np.zeros(shape, np.int64) for _ in range(3))
    segments, sources = (np.full(shape, -1, np.int64) for _ in range(2))
    mask = np.zeros(shape, np.bool_)
    num_bytes = np.array([sum(piece.num_bytes for piece in row) for row in rows], np.int64)
    numbers = np.arange(length)
    for i, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row):
            stop = start + len(piece.ids) - 1
            tokens[i, start:stop] = piece.ids[:-1]
            targets[i, start:stop] = piece.ids[1:]
            segments[i, start:stop] = segment
            positions[i, start:stop] = numbers[: stop - start]
            sources[i, start:stop] = piece.source
            mask[i, start:stop] = True if piece.trained is None else piece.trained[1:]
            start = stop
    return Batch(tokens, targets, segments, positions, sources, mask, num_bytes)
