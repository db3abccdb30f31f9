"""A loss of power, by a model of a file system on which nothing is on disk but what was synced.

While `recorded`, the calls that change files are watched. Before each of them, and at the end, the trees that a loss of power
may leave are noted: the data of files that were not synced are zeros, and the entries of directories are those of their last
sync. What a file system may write of its own accord is written in some of them: the entries of the outermost directory, those
of the others, all data.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Survivors: TypeAlias = "dict[str, bytes | Survivors]"
"""The entries of a directory: the bytes of files, and the entries of other directories."""

CALLS = [(os, name) for name in ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")] + [(io, "open")]


class Disk:
    """What is on disk of the directory `root`, all of which is at first.

    `broken`: kinds of files ("file", "directory") whose syncs do nothing, as if the writer had forgotten them.
    """

    def __init__(self, root: Path, broken: str = "") -> None:
        self._root, self._broken = root, broken
        self._data: dict[int, bytes] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._held: list[int] = []
        self._kinds: dict[int, bool] = {}
        self.trees: list[Survivors] = []
        for path in (root, *root.rglob("*")):
            self._sync(path)

    def fsynced(self, descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        if kind != self._broken:
            self._sync(Path(f"/proc/self/fd/{descriptor}").resolve())

    def survivors(self) -> list[Survivors]:
        """What a loss of power may leave now."""
        number = self._number(self._root)
        return [self._survivors(self._root, number, *newest) for newest in product([True, False], repeat=3)]

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _sync(self, path: Path) -> None:
        number = self._number(path)
        if number not in self._data and number not in self._entries:
            self._held.append(_OPEN(path, os.O_RDONLY))  # so that no other file gets this number
        if path.is_dir():
            self._entries[number] = self._now(path)
        else:
            self._data[number] = _read(path)

    def _now(self, path: Path) -> dict[str, int]:
        with os.scandir(path) as entries:
            found = {entry.name: entry.inode() for entry in entries}
        for name, number in found.items():
            self._kinds[number] = (path / name).is_dir()
        return found

    def _number(self, path: Path) -> int:
        return path.stat().st_ino

    def _survivors(self, path: Path | None, number: int, outer: bool, inner: bool, data: bool) -> Survivors:
        """The entries below a directory; `path` is None where it is gone, and `outer`, `inner` and `data` say what is newest.

        A file whose data is not newest and was never synced has zeros in its place.
        """
        entries = self._now(path) if path is not None and outer else self._entries.get(number, {})
        there = {child: name for name, child in self._now(path).items()} if path is not None else {}
        found: Survivors = {}
        for name, child in entries.items():
            place = path / there[child] if path is not None and child in there else None
            if self._kinds[child]:
                found[name] = self._survivors(place, child, inner, inner, data)
            elif place is not None and (data or child not in self._data):
                now = _read(place)
                found[name] = now if data else bytes(len(now))
            else:
                found[name] = self._data.get(child, b"")
        return found


@contextmanager
def recorded(root: Path, broken: str = "") -> Iterator[Disk]:
    """The disk under `root`, while the calls of this process that change files are watched."""
    disk = Disk(root, broken)

    def watched(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            disk.trees += disk.survivors()
            result = real(*args, **options)
            if name == "fsync":
                disk.fsynced(*args)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, watched(name, getattr(owner, name)))
        yield disk
    disk.trees += disk.survivors()
    disk.close()


def written(tree: Survivors, root: Path) -> Path:
    """Writes a tree that has survived to the directory `root`."""
    root.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            written(content, root / name)
    return root


_OPEN, _IO = os.open, io.open


def _read(path: Path) -> bytes:
    with _IO(path, "rb") as file:
        return bytes(file.read())
