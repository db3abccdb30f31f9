"""Addresses: files of remote file systems, by fsspec, restricted to protocols that serve plain bytes at any offset."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from typing import IO, Any, Protocol, TypedDict
from urllib.parse import unquote

from fnrecipe.errors import REDACTED, DataError, FnrecipeError, UsageError, did_you_mean, one_line

_LOCAL = ("file", "local")
# Others chain file systems, generate files, run programs or open archives; what they read has no size or offsets of its own.
_PROTOCOLS = (
    *("http", "https", "sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "memory"),
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "hf", "lakefs", "root"),
)


class _Info(TypedDict):
    type: str
    size: int | None


class FileSystem(Protocol):
    """The methods of fsspec's file systems that are used here; fsspec is untyped."""

    def info(self, path: str) -> _Info: ...
    def find(self, path: str, *, detail: bool) -> dict[str, _Info]: ...
    def glob(self, path: str, *, detail: bool) -> dict[str, _Info]: ...
    def open(self, path: str, mode: str, *, cache_type: str) -> IO[bytes]: ...
    def ukey(self, path: str) -> str: ...
    def unstrip_protocol(self, name: str) -> str: ...


def is_address(path: str) -> bool:
    """Whether fsspec reads a path; `file://` is the local file system, which is read without it."""
    return "://" in path and path.partition("://")[0].lower() not in _LOCAL


def local_path(path: str) -> str:
    """The path of an address of the local file system; any other path unchanged."""
    return path.partition("://")[2] if "://" in path and not is_address(path) else path


def find(pattern: str) -> tuple[dict[str, int], str]:
    """The size of each file that an address matches, by the file's address; and the address itself in that spelling.

    Raises:
        UsageError: if the protocol is not supported.
        DataError: if the file system cannot be reached, or does not report a file's size.
    """
    system, inner = filesystem(pattern)
    with _reported(pattern):
        found = _infos(system, inner, wild=is_wild(pattern))
        sized = {name: info if info.get("size") is not None else system.info(name) for name, info in found.items()}
    sizes = {name: info.get("size") for name, info in sized.items()}
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        where = system.unstrip_protocol(unknown[0])
        raise DataError(f"{where}: expected a file whose size is known, found none told by the server; copy it first")
    known = {system.unstrip_protocol(name): int(size) for name, size in sizes.items() if size is not None}
    return known, system.unstrip_protocol(inner)


def is_wild(address: str) -> bool:
    """Whether an address is a glob; in a web address, `?` begins the query."""
    return has_magic(address.partition("?")[0] if address.startswith("http") else address)


def open_file(address: str, *, ahead: bool) -> IO[bytes]:
    """Opens an address; with `ahead` it reads ahead, for files that are read sequentially."""
    system, inner = filesystem(address)
    with _reported(address):
        file = system.open(inner, "rb", cache_type="readahead" if ahead else "none")
    return _Reported(file, address)  # type: ignore[return-value]


def fingerprint(address: str) -> str:
    """What the file system reports of the content at an address: a checksum or a time."""
    system, inner = filesystem(address)
    with _reported(address):
        return str(system.ukey(inner)[:16])


class _Reported(io.RawIOBase):
    """A remote file that raises `DataError` only: each file system has exceptions of its own."""

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


def _infos(system: FileSystem, inner: str, *, wild: bool) -> dict[str, _Info]:
    if wild:
        return {name: info for name, info in system.glob(inner, detail=True).items() if info["type"] == "file"}
    try:
        info = system.info(inner)
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # on the web, the server's answer
            raise error.__cause__ from None
        return {}
    return system.find(inner, detail=True) if info["type"] == "directory" else {inner: info}


def filesystem(address: str) -> tuple[FileSystem, str]:
    """The file system of an address, and the path in it.

    Raises:
        UsageError: if the protocol is not supported, or needs a package that is not installed.
        DataError: if the file system cannot be reached.
    """
    protocol = address.partition("://")[0].lower()
    if "::" in address:
        raise UsageError(f"{address}: expected the address of one file system, found several chained by ::")
    if protocol not in _PROTOCOLS:
        hint = did_you_mean(protocol, [*_PROTOCOLS, "file"])
        raise UsageError(f"{address}: expected an address of files that are read as they are, found {protocol!r}; {hint}")
    if f"://{REDACTED}@" in address or f"={REDACTED}" in address:
        mend = "give it by --config, or leave secrets to the environment and to the files of the protocol"
        raise UsageError(f"{address}: expected a whole address, found one without its secret, as a run writes it; {mend}")
    import fsspec  # type: ignore[import-untyped]

    try:
        system, inner = fsspec.core.url_to_fs(address)
    except OSError as error:
        raise DataError(f"{address}: cannot read the data: {reason(error, address)}") from None
    except Exception as error:  # an ImportError, or whatever the file system's set-up raises
        extra = "; pip install 'fnrecipe[remote]'" if isinstance(error, ImportError) and protocol in ("s3", "s3a") else ""
        raise UsageError(f"{address}: cannot read this kind of address: {reason(error, address)}{extra}") from None
    return system, inner


@contextmanager
def _reported(address: str) -> Iterator[None]:
    """Turns every exception into a `DataError`; only around calls of the file system, so that none of our defects is hidden."""
    try:
        yield
    except FnrecipeError:
        raise
    except Exception as error:
        raise DataError(f"{address}: cannot read the data: {reason(error, address)}") from None


def reason(error: Exception, address: str) -> str:
    """Why a file system failed, on one line, without the secret of the address, of which some repeat parts in other words."""
    text = str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    user, at, _ = address.partition("://")[2].partition("@")
    if at and (":" in user or "/" not in user):
        for secret in filter(None, (user, user.partition(":")[2])):
            text = text.replace(secret, REDACTED).replace(unquote(secret), REDACTED)
    return one_line(text)
