"""Token arrays: flat `.npy`, or raw `.bin` as nanoGPT writes them, with a header or without; documents end with a token.

A header is 256 int32: 20240520 and version 1 for uint16 ids (GPT-2), 20240801 and version 7 for uint32 ids (Llama 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.blocks import Block
from fnrecipe.data.document import Document, Read
from fnrecipe.errors import DataError, UsageError

SUFFIXES = (".npy", ".bin")
_HEADERS: Mapping[tuple[int, ...], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_HEADER_BYTES = 1024
_STEP = 1 << 16
_SAMPLE, _FEW, _MOST, _ANY_VOCABULARY = 1 << 16, 32, 0.9, 1 << 20


def sizes(paths: Sequence[str], dtype: str) -> list[int]:
    """How many tokens each file holds."""
    return [len(_array(path, dtype)) for path in paths]


def check_dtype(path: str, dtype: str, vocab_size: int) -> None:
    """Whether a raw `.bin` file without a header looks like ids of its type, by its first, middle and last 64 KiB.

    It looks like a wider type if that type finds nearly all of the sample, zeros left out, within the vocabulary: of two
    narrow ids, the second would have to be 0, or hardly more. It looks like uint16 and not uint32 if most ids are beyond any
    vocabulary, and their halves within this one. Fewer than 32 ids tell nothing.

    Raises:
        UsageError: if it looks like ids of another type.
    """
    if path.endswith(".npy") or "://" in path:
        return
    sample, width = _sample(path), np.dtype(dtype).itemsize
    wider = [wide for wide in (4, 8) if wide > width and _share(sample, wide, above=0, below=vocab_size) > _MOST]
    beyond = _share(sample, 4, above=max(vocab_size, _ANY_VOCABULARY), below=1 << 32)
    if wider:
        likely = wider[-1]
    elif width == 4 and beyond > 0.5 and _share(sample, 2, above=0, below=vocab_size) > _MOST:
        likely = 2
    else:
        return
    hint = "write them as .npy" if likely == 8 else f"set `dtype: uint{8 * likely}` for this source, or write them as .npy"
    found = f"expected ids of `dtype: {dtype}`, found what looks like uint{8 * likely}"
    raise UsageError(f"{path}: {found}; {hint}, which holds its type")


def read(block: Block, *, dtype: str, eos: int, bos: int, vocab_size: int) -> Iterator[Read]:
    """The documents that start in a block of tokens: at the file's start and after each `eos`; a leading `bos` is no part."""
    tokens = _array(block.path, dtype)
    start = block.start if block.start == 0 or tokens[block.start - 1] == eos else _after(tokens, block.start, eos)
    while start < block.stop:
        stop = _after(tokens, start, eos)
        found: NDArray[Any] = tokens[start:stop]
        outside = np.flatnonzero((found < 0) | (found >= vocab_size))
        if len(outside):
            where = f"token {start + outside[0]:,}"
            yield DataError(f"{block.path}: {where}: expected ids below {vocab_size}, found {found[outside[0]]}")
        else:
            ids = np.array(found, np.int32)
            ids = ids[: -1 if ids[-1] == eos else None]
            yield Document(ids=ids[1 if len(ids) and ids[0] == bos else 0 :])
        start = stop


def starts(path: str, dtype: str, eos: int) -> NDArray[np.int64]:
    """Where each document of a file starts, int64."""
    tokens = _array(path, dtype)
    return np.concatenate([np.zeros(min(len(tokens), 1), np.int64), np.flatnonzero(tokens[:-1] == eos) + 1])


def _after(tokens: NDArray[np.generic], start: int, eos: int) -> int:
    """The place behind the first `eos` from `start` on; the end if there is none."""
    for first in range(start, len(tokens), _STEP):
        found = np.flatnonzero(tokens[first : first + _STEP] == eos)
        if len(found):
            return first + int(found[0]) + 1
    return len(tokens)


def _array(path: str, dtype: str) -> NDArray[np.generic]:
    """The tokens of a local file, mapped into memory."""
    if "://" in path:
        raise UsageError(f"{path}: token arrays are read from local files only; copy it first")
    try:
        if path.endswith(".npy"):
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
        offset, kind = _header(file, dtype)
        size = file.seek(0, 2)
    if (size - offset) % kind.itemsize:
        raise DataError(f"{path}: expected a multiple of {kind.itemsize} bytes for {kind} ids, found {size - offset:,}")
    return np.memmap(path, kind, "r", offset) if size > offset else np.empty(0, kind)


def _header(file: IO[bytes], dtype: np.dtype[Any]) -> tuple[int, np.dtype[Any]]:
    """Where the ids of a raw file begin, and their type: the one that its header says, or `dtype` if it has none."""
    header = np.frombuffer(file.read(_HEADER_BYTES), np.uint8)
    magic = tuple(header[:8].view("<i4").tolist()) if len(header) == _HEADER_BYTES else ()
    return (_HEADER_BYTES, _HEADERS[magic]) if magic in _HEADERS else (0, dtype)


def _sample(path: str) -> bytes:
    """Some bytes of a raw file, from places that every type of ids can begin at; none of a file whose header says its type."""
    try:
        with open(path, "rb") as file:
            if _header(file, np.dtype(np.uint8))[0]:
                return b""
            last = max(file.seek(0, 2) - _SAMPLE, 0) // 8 * 8
            found = []
            for start in sorted({0, last // 16 * 8, last}):
                file.seek(start)
                found.append(file.read(_SAMPLE))
    except OSError as error:
        raise DataError(f"{path}: cannot read the data: {error.strerror or error}") from None
    return b"".join(part[: len(part) // 8 * 8] for part in found)


def _share(sample: bytes, width: int, *, above: int, below: int) -> float:
    """The share of the ids of `width` bytes, zeros left out, from `above` up to `below`; 0 where they are too few to tell."""
    ids = np.frombuffer(sample, f"<u{width}")
    ids = ids[ids > 0]
    return float(((ids >= above) & (ids < below)).mean()) if len(ids) >= _FEW else 0.0
