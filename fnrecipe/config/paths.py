"""Paths that a user writes: one rule for all of them, in configs and on the command line."""

from __future__ import annotations

import os


def expanded(path: str) -> str:
    """`path` with a home directory in the place of a leading `~` or `~user`, as shells put it there; unchanged without one."""
    return os.path.expanduser(path)
