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
    "sft",
    "startup",
    "step",
    "stream",
    "updates",
)


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Counted rounds of each system.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write one JSON object a line.")
@click.option("--model", "models", multiple=True, help="step, race: only this model; may be repeated.")
@click.option(
    "--python", "pythons", multiple=True, help="step, sft: PEER=PATH, the Python to run a peer with; may be repeated."
)
@click.option("--minutes", type=click.FloatRange(min=0), help="faults, gpu, race: how long; 1, 9 and 25 by default.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="load: a directory of Hugging Face; random weights by default. sft: LLaMA-Factory's sdist, unpacked.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="race: a file of the runs that are done, which are not repeated.")
@click.option("--picture", type=click.Path(path_type=Path), help="race: the losses, as SVG.")
def main(
    name: str,
    rounds: int,
    path: Path | None,
    models: tuple[str, ...],
    pythons: tuple[str, ...],
    minutes: float | None,
    directory: Path | None,
    keep: Path | None,
    picture: Path | None,
) -> None:
    """Measure NAME and print a table of medians and ranges."""
    if name not in ("step", "race") and models:
        raise click.UsageError("--model is an option of step and race")
    if name not in ("step", "sft") and pythons:
        raise click.UsageError("--python is an option of step and sft")
    if name not in ("faults", "gpu", "race") and minutes is not None:
        raise click.UsageError("--minutes is an option of faults, gpu and race")
    if name != "race" and (keep or picture):
        raise click.UsageError("--keep and --picture are options of race")
    if name not in ("load", "sft") and directory is not None:
        raise click.UsageError("--directory is an option of load and sft")
    if name == "sft" and directory is None:
        raise click.UsageError("sft: --directory of LLaMA-Factory's sdist is missing")
    peers = dict(python.split("=", 1) for python in pythons)
    options: dict[str, dict[str, Any]] = {
        "step": {"models": models, "pythons": peers},
        "sft": {"directory": directory, "pythons": peers},
        "load": {"directory": directory},
        "faults": {"minutes": 1.0 if minutes is None else minutes},
        "gpu": {"minutes": 9.0 if minutes is None else minutes},
        "race": {"minutes": 25.0 if minutes is None else minutes, "keep": keep, "picture": picture, "models": models},
    }
    results = importlib.import_module(f"benchmarks.{name}").run(rounds, **options.get(name, {}))
    report.show(results)
    if path is not None:
        report.write(results, path)


main()
