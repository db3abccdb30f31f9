"""The search for a source's files below a path, a directory, a glob or an address, and a report of what is left out.

Each file is found once, however many links lead to it; what cannot be read is an error, never skipped.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import PurePath
from threading import Timer

import attrs

from fnrecipe.data import compressed, remote
from fnrecipe.data.files import File, check_regular, lower_name, reported
from fnrecipe.errors import DataError, UsageError, one_line

_PATIENCE = 5.0
_KINDS_TOLD = 8
_UNSAYABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_log = logging.getLogger(__name__)


@attrs.frozen
class Found:
    """The files of a source, sorted by path; and a line about what was left out, empty if nothing was."""

    files: Sequence[File]
    left_out: str = ""


@attrs.frozen
class _Entry:
    """A name in the local file system: the status of what it refers to, and whether it is a link."""

    path: str
    status: os.stat_result
    link: bool = False

    @property
    def identity(self) -> tuple[int, int]:
        return self.status.st_dev, self.status.st_ino

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


def find_files(pattern: str, suffixes: Sequence[str]) -> Found:
    """The files at a path: the file itself, those below a directory with one of `suffixes`, or the matches of a glob.

    Hidden files and folders are not searched. In a directory with `*.chunk.*` files, which is fairseq2's layout, only these are
    taken. A path with `://` is an address for fsspec. A search that takes long logs a warning.

    Raises:
        UsageError: if there is no file.
        DataError: at a dangling link, a folder that cannot be read, a pipe, a device or a socket.
    """
    left: Counter[str] = Counter()
    with _told_if_slow(pattern):
        if remote.is_address(pattern):
            sizes = _remote(pattern, suffixes, left)
        else:
            sizes = _local(remote.local_path(pattern), suffixes, left)
    if not sizes:
        raise UsageError(_nothing(pattern, suffixes, left))
    paths = sorted(sizes)
    folders = [os.path.dirname(path) + "/" for path in paths]
    root = os.path.commonprefix(folders).rpartition("/")[0] + "/"  # noqa: RUF071 (commonpath would mend the // of addresses)
    files = [File(path, path.removeprefix(root), sizes[path]) for path in paths]
    return Found(files, f"{pattern}: left out: {_counts(left)}" if any(left.values()) else "")


def _local(pattern: str, suffixes: Sequence[str], left: Counter[str]) -> dict[str, int]:
    if os.path.isdir(pattern):
        below = {entry.path: entry for entry in _below(pattern, left)}
        entries = [below[path] for path in _data(list(below), suffixes, left)]
    elif _is_there(pattern):
        entries = [_entry(pattern)]
    else:
        matches = list({entry.path: entry for entry in _glob(*_parts(pattern))}.values())
        entries = [entry for entry in matches if not entry.is_folder]
        left["folder(s)"] += (len(matches) - len(entries)) * ("**" not in pattern)
    once: dict[tuple[int, int], _Entry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.link, entry.path)):
        _check_name(entry.path)
        check_regular(entry.path, entry.status.st_mode)
        once.setdefault(entry.identity, entry)
    left["further name(s) of the same files"] += len(entries) - len(once)
    return {entry.path: entry.status.st_size for entry in once.values()}


def _remote(pattern: str, suffixes: Sequence[str], left: Counter[str]) -> dict[str, int]:
    sizes, root = remote.find(pattern)
    seen = [path for path in sizes if path.count("/.") <= root.count("/.")]
    if remote.is_wild(pattern) or sizes.keys() == {root}:
        return {path: sizes[path] for path in seen}
    left["hidden"] += len(sizes) - len(seen)
    return {path: sizes[path] for path in _data(seen, suffixes, left)}


def _data(paths: Sequence[str], suffixes: Sequence[str], left: Counter[str]) -> list[str]:
    """The paths of a directory's data files; the others are counted by kind in `left`."""
    found = [path for path in paths if lower_name(path).endswith(tuple(suffixes))]
    left.update(map(_kind, set(paths) - set(found)))
    chunks = [path for path in found if ".chunk." in os.path.basename(path)]
    if chunks:
        left["beside *.chunk.* files"] += len(found) - len(chunks)
    return chunks or found


def _below(top: str, left: Counter[str]) -> Iterator[_Entry]:
    """Every file below a directory that is not hidden; special files are refused."""
    for _, entries, hidden in _walk(top):
        left["hidden"] += hidden
        for entry in entries:
            check_regular(entry.path, entry.status.st_mode)
            if not entry.is_folder:
                yield entry


def _walk(top: str) -> Iterator[tuple[str, list[_Entry], int]]:
    """Each folder from `top` on, once: its path, its entries by name, and how many hidden names it has besides."""
    # Folders are known by device and inode, so links may form cycles. Links are followed after everything else: a folder below
    # `top` is found under its own path, not under that of a link to it.
    entered: set[tuple[int, int]] = set()
    plain, links = deque([_entry(top)]), deque[_Entry]()
    while plain or links:
        folder = (plain or links).popleft()
        if folder.identity in entered:
            continue
        entered.add(folder.identity)
        names = _names(folder.path)
        entries = [_entry(os.path.join(folder.path, name)) for name in names if not name.startswith(".")]
        yield folder.path, entries, len(names) - len(entries)
        for entry in entries:
            if entry.is_folder:
                (links if entry.link else plain).append(entry)


def _parts(pattern: str) -> tuple[str, list[str]]:
    """The folder that a glob starts in, empty for the current one, and its parts; a `/` at the end matches folders only."""
    parts = [part for part in pattern.split("/") if part]
    return "/" if pattern.startswith("/") else "", [*parts, "."] if pattern.endswith("/") else parts


def _glob(folder: str, parts: Sequence[str]) -> Iterator[_Entry]:
    """The matches of a glob, by the rules of Python's `glob`, which skips what it cannot read and loops on cyclic links."""
    if not parts:
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for inner, entries, _ in _walk(folder):
            yield from _glob(inner, rest) if rest else entries
        return
    if has_magic(first):
        names = [name for name in _names(folder) if name.startswith(".") == first.startswith(".") and fnmatchcase(name, first)]
    else:
        names = [first] if _is_there(os.path.join(folder, first)) else []
    for entry in (_entry(os.path.join(folder, name)) for name in names):
        if not rest:
            yield entry
        elif entry.is_folder:
            yield from _glob(entry.path, rest)


def _names(folder: str) -> list[str]:
    with reported(folder):
        return sorted(os.listdir(folder or "."))


def _entry(path: str) -> _Entry:
    link = os.path.islink(path)
    with reported(path):
        try:
            return _Entry(path, os.stat(path or "."), link)
        except FileNotFoundError:
            if not link:
                raise
    raise DataError(f"{path}: expected a file or a folder, found a link to {os.readlink(path)}, which is not there")


def _check_name(path: str) -> None:
    """Refuses names with control characters or half surrogates, which messages, logs and checkpoints could not hold."""
    if _UNSAYABLE.search(path):
        raise DataError(f"{one_line(path)}: expected a name in UTF-8 without control characters; rename it")


def _is_there(path: str) -> bool:
    with reported(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL byte
            return False
    return True


def _kind(path: str) -> str:
    suffixes = PurePath(lower_name(path)).suffixes
    size = 2 if suffixes and suffixes[-1] in compressed.SUFFIXES else 1
    return "".join(suffixes[-size:]) or "without suffix"


def _counts(left: Mapping[str, int]) -> str:
    kinds = [f"{count:,} {kind}" for kind, count in sorted(left.items()) if count]
    return one_line(", ".join(kinds[:_KINDS_TOLD] + [f"{len(kinds) - _KINDS_TOLD} more kinds"] * (len(kinds) > _KINDS_TOLD)))


def _nothing(pattern: str, suffixes: Sequence[str], left: Mapping[str, int]) -> str:
    found = "none in this directory" if os.path.isdir(remote.local_path(pattern)) else "no file, directory or match"
    plain = ", ".join(suffix for suffix in suffixes if not suffix.endswith(compressed.SUFFIXES))
    return f"{pattern}: expected data, found {found} ({plain})" + (f", but {_counts(left)}" if any(left.values()) else "")


@contextmanager
def _told_if_slow(pattern: str) -> Iterator[None]:
    timer = Timer(_PATIENCE, _log.warning, ("%s: still searching for files", pattern))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
