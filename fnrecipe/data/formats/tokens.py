"""Token arrays: flat `.npy`, or raw `.bin` as nanoGPT writes them, with a header or without; documents end with a token.

A header is 256 int32: 20240520 and version 1 for uint16 ids (GPT-2), 20240801 and version 7 for uint32 ids (Llama 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.blocks import Block, Blocks, cut, points
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import File
from fnrecipe.data.formats.format import Format, Reading, check_not_compressed
from fnrecipe.data.remote import is_address
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError

_HEADERS: Mapping[tuple[int, ...], np.dtype[np.generic]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_HEADER_BYTES = 1024
_STEP = 1 << 16
_SAMPLE, _FEW, _MOST, _ANY_VOCABULARY = 1 << 16, 32, 0.9, 1 << 20


def sizes(paths: Sequence[str], dtype: str) -> list[int]:
    """How many tokens each file holds."""
    return [len(_array(path, dtype)) for path in paths]


def check_dtype(path: str, dtype: str, vocab_size: int) -> None:
    """Whether a raw `.bin` file without a header looks like ids of its type, by its first, middle and last 64 KiB.

    It looks like a wider type if nine tenths of its ids as that type, zeros left out, are within the vocabulary, and their
    lower halves beyond what upper halves may be: every second narrow id would be 0, or hardly more, and no other. It looks
    like uint16 and not uint32 if most ids are beyond any vocabulary, and their halves within this one. Fewer than 32 ids
    tell nothing.

    Raises:
        UsageError: if it looks like ids of another type.
    """
    if path.endswith(".npy") or "://" in path:
        return
    sample, upper = _sample(path), (vocab_size - 1) >> 16
    narrow, ids, wide = (_not_zero(sample, width) for width in (2, 4, 8))
    beyond_all = _share(ids >= max(vocab_size, _ANY_VOCABULARY)) > 0.5
    looks_like = {
        16: dtype == "uint32" and beyond_all and _share(narrow < vocab_size) > _MOST,
        32: dtype == "uint16" and _share((ids < vocab_size) & (ids & 0xFFFF > upper)) > _MOST,
        64: _share((wide < vocab_size) & (wide & 0xFFFF > upper)) > _MOST,
    }
    likely = max((bits for bits, holds in looks_like.items() if holds), default=None)
    if likely is not None:
        found = f"expected ids of `dtype: {dtype}`, found what looks like uint{likely}"
        hint = f"set `dtype: uint{likely}` for this source, or " * (likely < 64)
        raise UsageError(f"{path}: {found}; {hint}write them as .npy, which holds its type")


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
            ids = ids[1 if len(ids) and ids[0] == bos else 0 :]
            yield Document(ids=ids, place=partial(str, f"{block.path}: token {start:,}"))


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


def _raw(path: str, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    with open(path, "rb") as file:
        offset, kind = _header(file, dtype)
        size = file.seek(0, 2)
    if (size - offset) % kind.itemsize:
        raise DataError(f"{path}: expected a multiple of {kind.itemsize} bytes for {kind} ids, found {size - offset:,}")
    return np.memmap(path, kind, "r", offset) if size > offset else np.empty(0, kind)


def _header(file: IO[bytes], dtype: np.dtype[np.generic]) -> tuple[int, np.dtype[np.generic]]:
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


def _not_zero(sample: bytes, width: int) -> NDArray[np.unsignedinteger]:
    """The ids of `width` bytes that are not 0; none if they are too few to tell anything."""
    ids = np.frombuffer(sample, f"<u{width}")
    ids = ids[ids > 0]
    return ids if len(ids) >= _FEW else ids[:0]


def _share(holds: NDArray[np.bool_]) -> float:
    return float(holds.mean()) if len(holds) else 0.0


def _plan(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    check_not_compressed(files, "tokens")
    paths = [file.path for file in files]
    for path in paths:
        check_dtype(path, reading.dtype, tokenizer.vocab_size)
    if by_document:
        return points(paths, [starts(path, reading.dtype, tokenizer.eos) for path in paths])
    return cut(paths, sizes(paths, reading.dtype))


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read(block, dtype=reading.dtype, eos=tokenizer.eos, bos=tokenizer.bos, vocab_size=tokenizer.vocab_size)


TOKENS = Format((".npy", ".bin"), _plan, _read)
