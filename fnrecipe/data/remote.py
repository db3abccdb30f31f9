"""Addresses: files of remote file systems by fsspec, of which only those are taken that read plain bytes at a place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from typing import IO, Any

from fnrecipe.errors import DataError, FnrecipeError, UsageError, did_you_mean, one_line

_LOCAL = ("file", "local")
# Others chain file systems, make files up, run programs or look into archives; what they read has no size or place of its own.
_PROTOCOLS = (
    *("http", "https", "sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "memory"),
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "hf", "lakefs", "root"),
)


def is_address(path: str) -> bool:
    """Whether a path is read by fsspec; `file://` is the local file system, by whose own rules its files are found."""
    return "://" in path and path.partition("://")[0].lower() not in _LOCAL


def local_path(path: str) -> str:
    """The path that an address of the local file system stands for."""
    return path.partition("://")[2] if "://" in path and not is_address(path) else path


def find(pattern: str) -> tuple[dict[str, int], str]:
    """The size of each file that an address names, by its own address; and the address in the same spelling.

    Raises:
        UsageError: if the address is of a kind that is not read.
        DataError: if the file system cannot be reached, or does not know how long a file is.
    """
    system, inner = _filesystem(pattern)
    with _reported(pattern):
        found = _infos(system, inner, wild=is_wild(pattern))
        sized = {name: info if info.get("size") is not None else system.info(name) for name, info in found.items()}
    unknown = [name for name, info in sized.items() if info.get("size") is None]
    if unknown:
        where = system.unstrip_protocol(unknown[0])
        raise DataError(f"{where}: expected a file whose size is known, found none told by the server; copy it first")
    return {system.unstrip_protocol(name): int(info["size"]) for name, info in sized.items()}, system.unstrip_protocol(inner)


def is_wild(address: str) -> bool:
    """Whether an address is a glob; `?` begins a query on the web."""
    return has_magic(address.partition("?")[0] if address.startswith("http") else address)


def open_file(address: str, *, ahead: bool) -> IO[bytes]:
    """The bytes at an address; read ahead, where they are read from one end to the other."""
    system, inner = _filesystem(address)
    with _reported(address):
        file = system.open(inner, "rb", cache_type="readahead" if ahead else "none")
    return _Reported(file, address)  # type: ignore[return-value]


def fingerprint(address: str) -> str:
    """What its file system knows of the content at an address: a checksum or a time."""
    system, inner = _filesystem(address)
    with _reported(address):
        return str(system.ukey(inner)[:16])


class _Reported(io.RawIOBase):
    """A remote file whose every failure is an error of the data: each file system has exceptions of its own."""

    def __init__(self, file: IO[bytes], address: str) -> None:
        self._file, self._address = file, address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with _reported(self._address):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _reported(self._address):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _infos(system: Any, inner: str, *, wild: bool) -> dict[str, Any]:
    if wild:
        return {name: info for name, info in system.glob(inner, detail=True).items() if info["type"] == "file"}
    try:
        info = system.info(inner)
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # the web's: what the server said
            raise error.__cause__ from None
        return {}
    found: dict[str, Any] = system.find(inner, detail=True) if info["type"] == "directory" else {inner: info}
    return found


def _filesystem(address: str) -> tuple[Any, str]:
    protocol = address.partition("://")[0].lower()
    if "::" in address:
        raise UsageError(f"{address}: expected the address of one file system, found several chained by ::")
    if protocol not in _PROTOCOLS:
        hint = did_you_mean(protocol, [*_PROTOCOLS, "file"])
        raise UsageError(f"{address}: expected an address of files that are read as they are, found {protocol!r}; {hint}")
    import fsspec  # type: ignore[import-untyped]

    try:
        system, inner = fsspec.core.url_to_fs(address)
    except OSError as error:
        raise DataError(f"{address}: cannot read the data: {one_line(error.strerror or str(error))}") from None
    except Exception as error:  # an ImportError, but also what the file system's own set-up raises
        raise UsageError(f"{address}: cannot read this kind of address: {one_line(str(error))}") from None
    return system, inner


@contextmanager
def _reported(address: str) -> Iterator[None]:
    """Only around calls of the file system: whatever comes out of them is its failure, and none of ours."""
    try:
        yield
    except FnrecipeError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{address}: cannot read the data: {one_line(str(reason))}") from None
