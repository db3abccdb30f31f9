"""Errors as the console shows them."""

from __future__ import annotations

import click


def show(text: str, rank: int | None = None) -> None:
    """A line for each line of `text`; indented ones belong to the line before them."""
    prefix = "error: " if rank is None else f"rank {rank}: error: "
    for line in text.splitlines():
        click.echo(line if line.startswith(" ") else prefix + line, err=True)
