"""`python -m benchmarks NAME [--rounds N] [--json FILE]`."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from benchmarks import report

NAMES = ("faults", "gang", "memory", "startup", "step", "stream")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Counted rounds of each system.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write one JSON object a line.")
def main(name: str, rounds: int, path: Path | None) -> None:
    """Measure NAME and print a table of medians and ranges."""
    results = importlib.import_module(f"benchmarks.{name}").run(rounds)
    report.show(results)
    if path is not None:
        report.write(results, path)


main()
