"""Tables on the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from rich.table import Table

    from fnrecipe.compiler.products import Kernel, Product

T = TypeVar("T")


def shortened(rows: Sequence[tuple[str, T]], total: Callable[[Sequence[T]], T], limit: int = 20) -> list[tuple[str, T]]:
    """The first `limit` named rows, and one row `3 others` with the total of the others, if there are any."""
    others = [value for _, value in rows[limit:]]
    return [*rows[:limit], *([(f"{len(others)} others", total(others))] if others else [])]


def print_table(table: Table) -> None:
    """Prints a table as wide as the terminal; 140 columns without one."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140)
    with console.capture() as captured:
        console.print(table)
    click.echo(captured.get(), nl=False)


def print_products(chosen: Mapping[Product, Kernel]) -> None:
    """Prints what computes each kind of large matrix product on a CPU, if there are any."""
    from rich.table import Table

    if not chosen:
        return
    caption = "n: row by row, t: the transposed view of such a matrix; measured on this processor"
    table = Table("large product", "layout", "computed by", caption=caption)
    for product, kernel in chosen.items():
        shape, layout = str(product).split(" ", 1)
        table.add_row(shape, layout.removesuffix(" compiled"), kernel)
    print_table(table)
