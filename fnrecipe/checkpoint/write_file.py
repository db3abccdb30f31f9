"""Writing of new files at the disk's speed, with their SHA-256: past the page cache where the file system lets them (O_DIRECT).

A copy into the page cache, which has to find memory for it, and its write-back take several times as long as the disk does.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

_BLOCK = 1 << 12
"""What addresses, offsets and sizes of direct writes are multiples of: the blocks of file systems, and of the disks below."""
_BUFFER = 1 << 22
"""Bytes that are written at a time."""
_HUGE = 1 << 21
"""A huge page. A write from those is few requests to the disk; from single pages it is one for each 254 of them, or more."""
_CACHED = 1 << 19
"""Bytes that are summed and copied at a time: while they are in a core's own cache."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_file(path: Path, parts: Sequence[Bytes]) -> str:
    """Writes bytes to a new file, one part behind the other, which is on disk then; its SHA-256.

    Raises:
        OSError: if it cannot be written; what is there of it stays.
    """
    # The digest is that of the memory, not of the file read back: if a byte is lost on its way to the disk, or later, the two
    # differ when the file is verified.
    size, end, digest = sum(part.size for part in parts), 0, hashlib.sha256()
    buffer = _buffer(_rounded(min(size, _BUFFER)))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _set_direct(descriptor, True)
        for pieces in _pieces(parts, buffer.size):
            filled = 0
            for piece in pieces:
                digest.update(piece.data)
                buffer[filled : filled + piece.size] = piece
                filled += piece.size
            _write(descriptor, buffer[: _rounded(filled)], end)
            end += filled
        os.ftruncate(descriptor, size)  # the last block was written whole
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _buffer(size: int) -> Bytes:
    """Memory that begins with a huge page, where there are any."""
    memory = mmap.mmap(-1, size + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # no Linux, or one without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(memory, np.uint8)
    return found[-found.ctypes.data % _HUGE :][:size]


def _pieces(parts: Sequence[Bytes], size: int) -> Iterator[list[Bytes]]:
    """Cuts the parts, one behind the other, every `size` bytes, and into pieces that the cache holds."""
    pieces, room = list[Bytes](), size
    for part in parts:
        start = 0
        while start < part.size:
            piece = part[start : start + min(room, _CACHED)]
            pieces.append(piece)
            start, room = start + piece.size, room - piece.size
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _write(descriptor: int, data: Bytes, offset: int) -> None:
    done = 0
    while done < data.size:
        try:
            done += os.pwrite(descriptor, data[done:].data, offset + done)
        except OSError as error:
            # What the disk needs the offset to be a multiple of may be more than a block, or what a full disk took, less.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Makes writes go past the page cache, where the file system lets them, or not; whether that changes them."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) != flags


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
