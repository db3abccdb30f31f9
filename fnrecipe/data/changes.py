"""Files of data that change while they are read: by their size and time, of which a look at each file is enough."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from fnrecipe.data.corpus import Corpus
from fnrecipe.data.remote import is_address

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds; (-1, -1) for a file that is not there."""


def stamps(corpora: Sequence[Corpus]) -> dict[tuple[str, str], Stamp]:
    """The stamp of each local file, by its name, as fingerprints have it, and its path."""
    files = [(f"{corpus.name}: {file.name}", file.path) for corpus in corpora for file in corpus.files]
    return {(name, path): _stamp(path) for name, path in files if not is_address(path)}


def changed(before: Mapping[tuple[str, str], Stamp]) -> list[str]:
    """The names of files that have another stamp by now."""
    return [name for (name, path), stamp in before.items() if _stamp(path) != stamp]


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns
