"""Files that are whole or not there, on disk and not in a cache."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """All of `data` in the file, or what was there before; never a part."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(data)
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
