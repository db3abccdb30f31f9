"""Documents, as the readers of all formats yield them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.errors import DataError

Ids: TypeAlias = NDArray[np.int32]


@attrs.frozen(eq=False)
class Document:
    """A document as text, as token ids int32 [n] without special tokens, or as both.

    bad    what is wrong with it -> the error that says where it is, for what is found later; None: nothing knows
    place  says where it is, as FILE:LINE or the like; None: nothing knows
    """

    text: str | None = None
    ids: Ids | None = None
    bad: Callable[[str], DataError] | None = None
    place: Callable[[], str] | None = None

    def __bool__(self) -> bool:
        return bool(self.text) or (self.ids is not None and len(self.ids) > 0)


Read: TypeAlias = Document | DataError
"""A document, or a bad record as an error value, which `stream.tolerate` raises or counts."""


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by a hash of its content, so that copies are in the same split."""
    content = document.ids if document.text is None else document.text.encode()
    return content is not None and zlib.crc32(content) < fraction * 2**32  # type: ignore[arg-type]
