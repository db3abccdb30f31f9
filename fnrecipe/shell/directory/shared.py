"""Whether all ranks see one output directory: at the same path, each host may have its own."""

from __future__ import annotations

import time
from pathlib import Path

from fnrecipe.errors import UsageError, few
from fnrecipe.runtime.gang import Gang, all_gather_objects
from fnrecipe.shell.directory.layout import LOCK

PATIENCE = 15.0
"""Seconds for which a network file system may show a host what was there before."""


def check_shared(out: Path, gang: Gang) -> None:
    """Whether each rank sees the directory that rank 0 has claimed.

    Without this, ranks that write parts of a checkpoint would write them to different disks, and nothing could go on from it.

    Raises:
        UsageError: on all ranks, with those that do not.
    """
    if gang.alone:
        return
    claim = all_gather_objects(gang, _content(out) if gang.leads else "")[0]
    until = time.monotonic() + PATIENCE
    while (sees := _content(out) == claim) is False and time.monotonic() < until:
        time.sleep(0.25)
    others = [rank for rank, seen in enumerate(all_gather_objects(gang, sees)) if not seen]
    if others:
        ranks = few([f"rank {rank}" for rank in others])
        raise UsageError(f"{out}: expected one directory that all ranks see, which rank 0 is writing to; not seen by {ranks}")


def _content(out: Path) -> str:
    try:
        return (out / LOCK).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
