"""Files that are complete and on disk, or not there; only regular ones: no links, pipes or devices."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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
    """Replaces the file's content by `data`, atomically: a crash leaves the old content or the new."""
    with written(path) as file:
        file.write(data)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` at the end, atomically; if the body raises, all stays as it was."""
    tmp = path.with_suffix(".tmp")
    tmp.unlink(missing_ok=True)
    try:
        with tmp.open("xb") as file:
            yield file
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(tmp)
    tmp.replace(path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Makes a directory, and those above it; those that were made are in the lists of the ones above them, on disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        with suppress(PermissionError):  # one that may be written to, but not read
            sync(each.parent)


def sync(path: Path) -> None:
    """fsync of a file, or of a directory, whose list of files is then on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_kind(path: Path, expected: int = stat.S_IFREG) -> None:
    """Checks that `path` is of the kind `expected`, one of those in `stat`.

    Raises:
        OSError: naming the kind that it is instead; if it is not there.
    """
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != expected:
        raise OSError(errno.EINVAL, f"expected {_KINDS[expected]}, found {_KINDS.get(kind, 'something else')}", str(path))


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Links are not followed; pipes, of which opening may block, are not opened.

    Raises:
        OSError: if it cannot be opened or is no regular file.
    """
    with suppress(FileNotFoundError):  # whether it is created then is up to `flags`
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
