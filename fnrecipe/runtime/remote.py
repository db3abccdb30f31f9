"""A directory on any file system that fsspec reaches, by files that are read back once they are written.

Renaming is not atomic on most of these, and a copy on object stores: nothing here renames. A file of an object store is there
whole or not at all; elsewhere half of one may be left. Whoever needs several files complete writes one of them last.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, Protocol, TypeVar, cast

import attrs

from fnrecipe.data.remote import filesystem, is_address, local_path, reason
from fnrecipe.errors import FnrecipeError
from fnrecipe.runtime.files import sync

_WITH_FOLDERS = ("sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "root")
"""Protocols under which folders have to be made. On object stores that would make a bucket of a mistyped name."""
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotImplementedError, PermissionError)
"""Errors that another attempt does not mend."""
_ATTEMPTS, _FIRST_PAUSE = 5, 1.0
_BLOCK = 1 << 24

T = TypeVar("T")


class _FileSystem(Protocol):
    """The methods of fsspec's file systems that are used here; fsspec is untyped."""

    def find(self, path: str) -> list[str]: ...
    def open(self, path: str, mode: str) -> IO[bytes]: ...
    def rm(self, path: str, recursive: bool) -> None: ...
    def rm_file(self, path: str) -> None: ...
    def makedirs(self, path: str, exist_ok: bool) -> None: ...
    def invalidate_cache(self) -> None: ...


@attrs.frozen
class RemoteDirectory:
    """A directory at an address, or of this machine by its path; files in it have names such as `checkpoints/a/b`.

    What fails for a reason that may pass, as a network does, is tried five times, over 15 seconds.

    Every method raises:
        FnrecipeError: if it cannot be done, with the address.
    """

    address: str
    _system: _FileSystem
    _path: str
    _folders: bool
    _local: bool

    def names(self) -> set[str]:
        """The names of all files in it and below; none if it is not there."""

        def found() -> set[str]:
            self._system.invalidate_cache()
            return {path.removeprefix(f"{self._path}/") for path in self._system.find(self._path)}

        return self._tried("list", "", found)

    def write(self, name: str, source: BinaryIO) -> str:
        """Writes a file with the content of `source`, and reads it back; the SHA-256 of both."""

        def written() -> str:
            source.seek(0)
            if self._folders:
                self._system.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            digest = hashlib.sha256()
            with self._system.open(self._at(name), "wb") as target:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)
            if self._local:
                sync(Path(self._at(name)))
                sync(Path(self._at(name)).parent)
            with self._system.open(self._at(name), "rb") as file:
                back = hashlib.sha256()
                while block := file.read(_BLOCK):
                    back.update(block)
            if back.digest() != digest.digest():
                raise OSError("what was read back is not what was written")
            return digest.hexdigest()

        return self._tried("write", name, written)

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file, which has `limit` bytes at most."""
        content = io.BytesIO()
        self._copied(name, content, limit)
        return content.getvalue()

    def fetch(self, name: str, target: Path, limit: int | None = None) -> None:
        """Copies a file to a new one of this machine, which is on disk then; of `limit` bytes at most."""
        with target.open("xb") as file:
            self._copied(name, file, limit)
        sync(target)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

        def removed() -> None:
            try:
                self._system.rm_file(self._at(name))
            except FileNotFoundError:
                return

        self._tried("remove", name, removed)

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it, if it is there."""

        def removed() -> None:
            self._system.invalidate_cache()
            try:
                self._system.rm(self._at(name), recursive=True)
            except FileNotFoundError:
                return

        self._tried("remove", name, removed)

    def _copied(self, name: str, target: BinaryIO, limit: int | None) -> None:
        def copied() -> None:
            target.seek(0)
            target.truncate()
            with self._system.open(self._at(name), "rb") as source:
                while block := source.read(_BLOCK):
                    target.write(block)
                    if limit is not None and target.tell() > limit:
                        raise FnrecipeError(f"{self.address}/{name}: expected at most {limit:,} bytes, found more")
            target.flush()

        self._tried("read", name, copied)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _tried(self, verb: str, name: str, work: Callable[[], T]) -> T:
        # Each file system has exceptions of its own, so that any may be a network's; a defect of ours is tried in vain.
        pause, where = _FIRST_PAUSE, f"{self.address}/{name}".rstrip("/")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return work()
            except FnrecipeError:
                raise
            except Exception as error:
                if attempt == _ATTEMPTS or isinstance(error, _FINAL):
                    raise FnrecipeError(f"{where}: cannot {verb}: {reason(error, self.address)}") from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError


def remote_directory(address: str) -> RemoteDirectory:
    """The directory at an address of fsspec, or of this machine by its path or `file://`; it need not be there.

    Raises:
        UsageError: if the protocol is not supported, or needs a package that is not installed.
        DataError: if the file system cannot be reached.
    """
    if is_address(address):
        system, path = filesystem(address)
        folders = address.partition("://")[0].lower() in _WITH_FOLDERS
        return RemoteDirectory(address.rstrip("/"), cast("_FileSystem", system), path.rstrip("/"), folders, local=False)
    import fsspec  # type: ignore[import-untyped]

    path = str(Path(local_path(address)).absolute())
    return RemoteDirectory(path, cast("_FileSystem", fsspec.filesystem("file")), path, folders=True, local=True)
