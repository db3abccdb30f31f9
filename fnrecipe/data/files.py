"""Files of data, local or remote, plain or compressed: opening and fingerprints."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import attrs

from fnrecipe.data import compressed, remote
from fnrecipe.errors import DataError, one_line

_SAMPLE = 1 << 16
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@attrs.frozen
class File:
    """A file of a source: its path or address, its name below the source's path, and its size in bytes."""

    path: str
    name: str
    size: int


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Opens a file; yields its bytes, decompressed.

    Raises:
        DataError: if it cannot be read.
    """
    with reported(path), _open(path) as raw, compressed.content(raw, lower_name(path)) as content:
        yield content


def lower_name(path: str) -> str:
    """The path to look for suffixes in: in lower case, and without the query of a web address."""
    return (path.partition("?")[0] if path.startswith(("http://", "https://")) else path).lower()


def fingerprint(file: File) -> str:
    """A fingerprint of a file's content: its size, and a digest of its first, middle and last 64 KiB.

    For an address, instead of the digest, what its file system reports without reading the file: a checksum or a time.
    """
    with reported(file.path):
        if remote.is_address(file.path):
            return f"{file.size} bytes, {remote.fingerprint(file.path)}"
        digest = hashlib.sha256()
        with _open(file.path) as raw:
            for start in sorted({0, max(file.size - _SAMPLE, 0) // 2, max(file.size - _SAMPLE, 0)}):
                raw.seek(start)
                digest.update(raw.read(_SAMPLE))
    return f"{file.size} bytes, {digest.hexdigest()[:16]}"


def check_regular(path: str, mode: int) -> None:
    """Refuses what is neither a file nor a folder by its mode: a pipe blocks without a writer, and can be read only once.

    Raises:
        DataError: naming its kind.
    """
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind:
        raise DataError(f"{path}: expected a file that can be read again, found {kind}; write it to a file first")


@contextmanager
def reported(path: str) -> Iterator[None]:
    """Turns errors of the operating system or a decompressor into a `DataError` of one line that names the file."""
    try:
        yield
    except Exception as error:
        if compressed.is_damage(error):
            raise DataError(f"{path}: expected a whole compressed file, found damage: {error}") from None
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot read the data: {one_line(error.strerror or str(error))}") from None
        raise


def _open(path: str) -> IO[bytes]:
    """The file as it is stored. A pipe that replaced a file after the search is refused without blocking."""
    if remote.is_address(path):
        return remote.open_file(path, ahead=lower_name(path).endswith(compressed.SUFFIXES))
    file = open(remote.local_path(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        check_regular(path, os.fstat(file.fileno()).st_mode)
    except DataError:
        file.close()
        raise
    return file
