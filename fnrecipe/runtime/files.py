"""Files that are whole or not there, on disk and not in a cache; and nothing but files: no links, pipes or devices."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


def replace(path: Path, data: bytes) -> None:
    """All of `data` in the file, or what was there before; never a part."""
    beside = path.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    with beside.open("xb") as file:
        file.write(data)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the list of the files in a directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_kind(path: Path, expected: int = stat.S_IFREG) -> None:
    """Whether `path` is of the kind `expected`, of those in `stat`.

    Raises:
        OSError: saying what it is instead; if it is not there.
    """
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != expected:
        raise OSError(errno.EINVAL, f"expected {_KINDS[expected]}, found {_KINDS.get(kind, 'something else')}", str(path))


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. A link is not followed, and a pipe, which would have to be waited for, not opened.

    Raises:
        OSError: if it cannot be opened or is no regular file.
    """
    with suppress(FileNotFoundError):  # `flags` say whether it is made then
        check_kind(path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: if it cannot be read, is no regular file, or has more than `limit` bytes.
    """
    with open(opened(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"expected at most {limit:,} bytes, found {size:,}", str(path))
        return file.read(limit)
