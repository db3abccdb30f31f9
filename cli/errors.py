"""Error messages on the console."""

from __future__ import annotations

import sys
from contextlib import closing

from fnrecipe.shell.console import Outlet


def show(text: str, rank: int | None = None) -> None:
    """Writes each line of `text` to standard error with a prefix; indented lines continue the line before them."""
    prefix = "error: " if rank is None else f"rank {rank}: error: "
    with closing(Outlet(sys.stderr)) as errors:
        for line in text.splitlines():
            errors.write(f"{line if line.startswith(' ') else prefix + line}\n")
