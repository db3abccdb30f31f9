"""`fnrecipe train RECIPE --out DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fnrecipe.cli.find import find
from fnrecipe.cli.launch import launch
from fnrecipe.cli.options import ConfigCommand, config_options, with_changes_option
from fnrecipe.config import resolve


@click.command(cls=ConfigCommand, short_help="Train a recipe, or go on with it.")
@click.argument("recipe")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where everything is written.")
@click.option("--nproc", type=click.IntRange(min=2), help="Start so many processes on this machine, by torch's launcher.")
@config_options
@with_changes_option
def train(
    recipe: str, out: Path, nproc: int | None, files: tuple[Path, ...], pairs: tuple[str, ...], with_changes: bool
) -> int:
    """Train RECIPE in DIR, or go on with the run that is there.

    RECIPE is the name of one that comes with fnrecipe (lm), a file that defines `recipe`, or module:attribute.

    \b
    fnrecipe train lm --out runs/first
    fnrecipe train lm --out runs/mine --config 'dataset.sources=[{path: data/}]'
    """
    found = find(recipe)
    config, _ = resolve(found.config, files, pairs)
    if nproc is not None:
        return launch(nproc, _without_nproc(sys.argv[1:]))
    from fnrecipe import host, run

    return run.train(found.load(), config, out, with_changes=with_changes, started=host.process_started())


def _without_nproc(args: Sequence[str]) -> list[str]:
    at = next(i for i, arg in enumerate(args) if arg.startswith("--nproc"))
    return [*args[:at], *args[at + (1 if "=" in args[at] else 2) :]]
