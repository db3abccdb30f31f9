"""Tables as commands print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """Prints a table as wide as the terminal, or wide enough where there is none."""
    from rich.console import Console

    Console(width=None if Console().is_terminal else 140).print(table)
