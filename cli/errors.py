"""Errors as the console shows them."""

from __future__ import annotations

import sys
from contextlib import closing

from fnrecipe.shell.console import Outlet


def show(text: str, rank: int | None = None) -> None:
    """A line for each line of `text`; indented ones belong to the line before them."""
    prefix = "error: " if rank is None else f"rank {rank}: error: "
    with closing(Outlet(sys.stderr)) as errors:
        for line in text.splitlines():
            errors.write(f"{line if line.startswith(' ') else prefix + line}\n")
