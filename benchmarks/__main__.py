"""`python -m benchmarks NAME [--rounds N] [--json FILE]`, and options of single benchmarks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from benchmarks import report

NAMES = (
    "adapters",
    "attention",
    "faults",
    "gang",
    "generate",
    "gpu",
    "load",
    "memory",
    "optimizers",
    "overhead",
    "padding",
    "race",
    "saving",
    "sft",
    "startup",
    "step",
    "stream",
    "updates",
)
TAKES = {
    "models": ("step", "race"),
    "pythons": ("step", "sft"),
    "systems": ("step",),
    "minutes": ("faults", "gpu", "race"),
    "directory": ("load", "sft"),
    "megabytes": ("saving",),
    "keep": ("race",),
    "picture": ("race",),
}
"""Which benchmarks take an option, an argument of their `run`."""


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Counted rounds of each system.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write one JSON object a line.")
@click.option("--model", "models", multiple=True, help="step, race: only this model; may be repeated.")
@click.option(
    "--python", "pythons", multiple=True, help="step, sft: PEER=PATH, the Python to run a peer with; may be repeated."
)
@click.option("--system", "systems", multiple=True, help="step: only this system; may be repeated.")
@click.option("--minutes", type=click.FloatRange(min=0), help="faults, gpu, race: how long; 1, 9 and 25 by default.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="load: a directory of Hugging Face; random weights by default. sft: LLaMA-Factory's sdist, unpacked.",
)
@click.option("--megabytes", type=click.FloatRange(min=1), help="saving: the size of the state; 1400 by default.")
@click.option("--keep", type=click.Path(path_type=Path), help="race: a file of the runs that are done, which are not repeated.")
@click.option("--picture", type=click.Path(path_type=Path), help="race: the losses, as SVG.")
def main(name: str, rounds: int, path: Path | None, **options: Any) -> None:
    """Measure NAME and print a table of medians and ranges."""
    given = {option: value for option, value in options.items() if value not in (None, ())}
    for option in given:
        if name not in TAKES[option]:
            flag = option if option in ("minutes", "megabytes") else option.removesuffix("s")
            raise click.UsageError(f"--{flag} is an option of {' and '.join(TAKES[option])}")
    if name == "sft" and "directory" not in given:
        raise click.UsageError("sft: --directory of LLaMA-Factory's sdist is missing")
    if "pythons" in given:
        given["pythons"] = dict(python.split("=", 1) for python in given["pythons"])
    results = importlib.import_module(f"benchmarks.{name}").run(rounds, **given)
    report.show(results)
    if path is not None:
        report.write(results, path)


main()
