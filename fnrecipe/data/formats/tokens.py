"""Token arrays: flat `.npy`, or raw `.bin` as nanoGPT writes them, with a header or without; documents end with a token.

A header is 256 int32: 20240520 and version 1 for uint16 ids (GPT-2), 20240801 and version 7 for uint32 ids (Llama 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.blocks import Block
from fnrecipe.data.document import Document, Read
from fnrecipe.data.remote import is_address
from fnrecipe.errors import DataError, UsageError

SUFFIXES = (".npy", ".bin")
_HEADERS: Mapping[tuple[int, ...], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_HEADER_BYTES = 1024
_STEP = 1 << 16


def sizes(paths: Sequence[str], dtype: str) -> list[int]:
    """How many tokens each file holds."""
    return [len(_array(path, dtype)) for path in paths]


def read(block: Block, *, dtype: str, eos: int, bos: int, vocab_size: int) -> Iterator[Read]:
    """The documents that start in a block of tokens: at the file's start and after each `eos`; a leading `bos` is no part."""
    tokens = _array(block.path, dtype)
    for start, stop in islice(_spans(tokens, block, eos), block.stripe, None, block.stripes):
        found: NDArray[Any] = tokens[start:stop]
        outside = np.flatnonzero((found < 0) | (found >= vocab_size))
        if len(outside):
            where = f"token {start + outside[0]:,}"
            yield DataError(f"{block.path}: {where}: expected ids below {vocab_size}, found {found[outside[0]]}")
        else:
            ids = np.array(found, np.int32)
            ids = ids[: -1 if ids[-1] == eos else None]
            yield Document(ids=ids[1 if len(ids) and ids[0] == bos else 0 :])


def starts(path: str, dtype: str, eos: int) -> NDArray[np.int64]:
    """Where each document of a file starts, int64."""
    tokens = _array(path, dtype)
    return np.concatenate([np.zeros(min(len(tokens), 1), np.int64), np.flatnonzero(tokens[:-1] == eos) + 1])


def _spans(tokens: NDArray[np.generic], block: Block, eos: int) -> Iterator[tuple[int, int]]:
    """Where each document of a block starts and stops."""
    start = block.start if block.start == 0 or tokens[block.start - 1] == eos else _after(tokens, block.start, eos)
    while start < block.stop:
        stop = _after(tokens, start, eos)
        yield start, stop
        start = stop


def _after(tokens: NDArray[np.generic], start: int, eos: int) -> int:
    """The place behind the first `eos` from `start` on; the end if there is none."""
    for first in range(start, len(tokens), _STEP):
        found = np.flatnonzero(tokens[first : first + _STEP] == eos)
        if len(found):
            return first + int(found[0]) + 1
    return len(tokens)


def _array(path: str, dtype: str) -> NDArray[np.generic]:
    """The tokens of a local file, mapped into memory."""
    if is_address(path):
        raise UsageError(f"{path}: token arrays are read from local files only; copy it first")
    try:
        if path.lower().endswith(".npy"):
            found: NDArray[np.generic] = np.lib.format.open_memmap(path, mode="r")
        else:
            found = _raw(path, np.dtype(dtype).newbyteorder("<"))
    except OSError as error:
        raise DataError(f"{path}: cannot read the data: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: expected an array of token ids, found {error}") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"{path}: expected a flat array of integers, found {found.dtype} {list(found.shape)}")
    return found


def _raw(path: str, dtype: np.dtype[Any]) -> NDArray[np.generic]:
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(_HEADER_BYTES), np.uint8)
        size = file.seek(0, 2)
    magic = tuple(header[:8].view("<i4").tolist()) if len(header) == _HEADER_BYTES else ()
    offset = _HEADER_BYTES if magic in _HEADERS else 0
    kind = _HEADERS.get(magic[:2], dtype)
    if (size - offset) % kind.itemsize:
        raise DataError(f"{path}: expected a multiple of {kind.itemsize} bytes for {kind} ids, found {size - offset:,}")
    return np.memmap(path, kind, "r", offset) if size > offset else np.empty(0, kind)
