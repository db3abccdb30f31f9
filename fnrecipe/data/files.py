"""Files of data, local or remote, plain or compressed: what a path names, how each is opened, and how each is recognised."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape, glob, has_magic
from typing import IO, Any

import attrs

from fnrecipe.errors import DataError, UsageError

COMPRESSIONS = (".gz", ".zst")
_SAMPLE = 1 << 16


@attrs.frozen
class File:
    """A file of a source: its path or address, its name below the source's path, and its size in bytes."""

    path: str
    name: str
    size: int


def find_files(pattern: str, suffixes: Sequence[str]) -> list[File]:
    """The files that a path names: the file itself, those below a directory with one of `suffixes`, or a glob's matches.

    Sorted by path; hidden files and folders are not searched. In a directory that holds `*.chunk.*` files, as fairseq2
    lays its data out, only these are taken. With `://` in it, the path is an address that fsspec understands.

    Raises:
        UsageError: if there is none.
    """
    paths, size = (_remote if "://" in pattern else _local)(pattern, tuple(suffixes))
    if not paths:
        found = "none in this directory" if os.path.isdir(pattern) else "no file, directory or match"
        raise UsageError(f"{pattern}: expected data, found {found} ({', '.join(suffixes)})")
    kept = sorted(paths)
    folders = [os.path.dirname(path) + "/" for path in kept]
    root = os.path.commonprefix(folders).rpartition("/")[0] + "/"  # noqa: RUF071 (commonpath would mend the // of addresses)
    return [File(path, path.removeprefix(root), size(path)) for path in kept]


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Raises:
        DataError: if it cannot be read.
    """
    with _reported(path), _open(path) as raw:
        if path.endswith(".gz"):
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        elif path.endswith(".zst"):
            with _zstd().open(raw) as file:
                yield file
        else:
            yield raw


def damage(error: BaseException) -> bool:
    """Whether an error says that compressed bytes are cut off or wrong."""
    return isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | _zstd().ZstdError)


def fingerprint(file: File) -> str:
    """What tells a file from another one of its name: its size and a digest of its first, middle and last 64 KiB.

    For an address, of what its file system knows of the file: a checksum or a time, without reading it.
    """
    if "://" in file.path:
        system, inner = _filesystem(file.path)
        with _reported(file.path):
            return f"{file.size} bytes, {system.ukey(inner)[:16]}"
    digest = hashlib.sha256()
    with _reported(file.path), _open(file.path) as raw:
        for start in sorted({0, max(file.size - _SAMPLE, 0) // 2, max(file.size - _SAMPLE, 0)}):
            raw.seek(start)
            digest.update(raw.read(_SAMPLE))
    return f"{file.size} bytes, {digest.hexdigest()[:16]}"


def _local(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[str], Callable[[str], int]]:
    if os.path.isdir(pattern):
        below = glob(os.path.join(escape(pattern), "**", "*"), recursive=True)
        return _data([path for path in below if os.path.isfile(path)], suffixes), os.path.getsize
    if os.path.isfile(pattern):
        return [pattern], os.path.getsize
    return [path for path in set(glob(pattern, recursive=True)) if os.path.isfile(path)], os.path.getsize


def _remote(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[str], Callable[[str], int]]:
    system, inner = _filesystem(pattern)
    with _reported(pattern):
        if has_magic(inner):
            found = [path for path, info in system.glob(inner, detail=True).items() if info["type"] == "file"]
        elif system.isdir(inner):
            found = _data(system.find(inner), suffixes)
        else:
            found = [inner] if system.exists(inner) else []
    found = [path for path in found if path.count("/.") <= inner.count("/.")]
    return [system.unstrip_protocol(path) for path in found], lambda path: int(system.size(_filesystem(path)[1]) or 0)


def _data(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The files of a directory that hold its data."""
    found = [path for path in paths if path.endswith(suffixes)]
    return [path for path in found if ".chunk." in os.path.basename(path)] or found


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    if "::" in address:
        raise UsageError(f"{address}: expected the address of one file system, found several chained by ::")
    try:
        system, inner = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{address}: cannot read this kind of address: {error}") from None
    return system, inner


def _open(path: str) -> IO[bytes]:
    if "://" not in path:
        return open(path, "rb")
    system, inner = _filesystem(path)
    file: IO[bytes] = system.open(inner, "rb", cache_type="none" if not path.endswith(COMPRESSIONS) else "readahead")
    return file


@contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if damage(error):
            raise DataError(f"{path}: expected a whole compressed file, found damage: {error}") from None
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot read the data: {error.strerror or error}") from None
        raise


def _zstd() -> Any:
    """The standard library's zstd, which Python has had since 3.14."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
