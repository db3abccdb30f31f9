"""Text with special tokens in it, as chat templates write it: encoded, with the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.document import Ids

Spans: TypeAlias = NDArray[np.int64]
"""int64 [n, 2]: for each of n tokens, its first character and the one behind its last."""

Piece: TypeAlias = str | int
"""Text, which becomes no special token; or the id of a special token."""


@attrs.frozen(eq=False)
class Encoded:
    """The ids of some pieces, int32 [n], and their spans in the pieces' text, in which special tokens stand by their names."""

    ids: Ids
    spans: Spans


def encode_each(
    pieces: Sequence[Piece],
    *,
    encode: Callable[[Sequence[str]], list[Ids]],
    spans: Callable[[str, Ids], Spans],
    special: Mapping[str, int],
) -> Encoded:
    """Encodes each text by itself, by `encode`; `spans(text, ids)` are those in that text."""
    names = {number: name for name, number in special.items()}
    encoded = iter(encode([piece for piece in pieces if isinstance(piece, str)]))
    ids, found, place = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)], 0
    for piece in pieces:
        text = piece if isinstance(piece, str) else names[piece]
        here = next(encoded) if isinstance(piece, str) else np.array([piece], np.int32)
        inside = spans(text, here) if isinstance(piece, str) else np.array([[0, len(text)]], np.int64)
        ids.append(here)
        found.append(inside + place)
        place += len(text)
    return Encoded(np.concatenate(ids), np.concatenate(found))


def byte_spans(text: str, ids: Ids, *, num_bytes: NDArray[np.int64]) -> Spans:
    """The spans of tokens that stand for the bytes of `text` one after the other; those that share a character all have it."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    starts, ends = np.cumsum(widths) - widths, np.cumsum(num_bytes[ids])
    first = np.searchsorted(starts, ends - num_bytes[ids], side="right") - 1
    return np.stack([first, np.searchsorted(starts, ends, side="left")], axis=1).astype(np.int64)
