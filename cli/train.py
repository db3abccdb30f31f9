"""`fnrecipe train RECIPE --out DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from fnrecipe.cli.find import find
from fnrecipe.cli.launch import check_only_launcher, launch
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options, with_changes_option
from fnrecipe.config import resolve
from fnrecipe.launcher import meeting


@click.command(cls=ConfigCommand, short_help="Train a recipe, or go on with it.")
@click.argument("recipe")
@click.option("--out", required=True, type=FilePath(), metavar="DIR", help="Where everything is written.")
@click.option("--nproc", type=click.IntRange(min=1), help="Start so many processes on this machine.")
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
    if nproc is not None and meeting() is None:
        check_only_launcher()
        if nproc > 1:
            return launch(nproc)
    from fnrecipe import run

    return run.train(found.load(), config, out, with_changes=with_changes)
