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
    "sft",
    "startup",
    "step",
    "stream",
)


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Counted rounds of each system.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write one JSON object a line.")
@click.option("--model", "models", multiple=True, help="step: only this model; may be repeated.")
@click.option(
    "--python", "pythons", multiple=True, help="step, sft: PEER=PATH, the Python to run a peer with; may be repeated."
)
@click.option("--minutes", type=click.FloatRange(min=0), help="faults, gpu: how long; 1 and 9 by default.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="load: a directory of Hugging Face; random weights by default. sft: LLaMA-Factory's sdist, unpacked.",
)
def main(
    name: str,
    rounds: int,
    path: Path | None,
    models: tuple[str, ...],
    pythons: tuple[str, ...],
    minutes: float | None,
    directory: Path | None,
) -> None:
    """Measure NAME and print a table of medians and ranges."""
    if name != "step" and models:
        raise click.UsageError("--model is an option of step")
    if name not in ("step", "sft") and pythons:
        raise click.UsageError("--python is an option of step and sft")
    if name not in ("faults", "gpu") and minutes is not None:
        raise click.UsageError("--minutes is an option of faults and gpu")
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
    }
    results = importlib.import_module(f"benchmarks.{name}").run(rounds, **options.get(name, {}))
    report.show(results)
    if path is not None:
        report.write(results, path)


main()
