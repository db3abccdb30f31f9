"""`fnrecipe train RECIPE --out DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from fnrecipe.cli.find import Found, find
from fnrecipe.cli.fit import check_fit, of_training, world
from fnrecipe.cli.launch import launch
from fnrecipe.cli.options import ConfigCommand, config_args, config_options, nproc_option, with_changes_option
from fnrecipe.config import resolve


@click.command(cls=ConfigCommand, short_help="Train a recipe, or go on with it.")
@click.argument("recipe")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where everything is written.")
@nproc_option
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
    return start(recipe, find(recipe), out, nproc, files, pairs, with_changes)


def start(
    name: str,
    found: Found,
    out: Path,
    nproc: int | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
    with_changes: bool,
) -> int:
    """Trains in this process, or in `nproc` processes that find the recipe by its `name` again."""
    config, _ = resolve(found.config, files, pairs)
    ranks, local = (nproc, nproc) if nproc is not None else world()
    check_fit(config, found.needs, parts=of_training(config), ranks=ranks, local=local)
    if nproc is not None:
        options = [*(["--resume-with-changes"] if with_changes else []), *config_args(files, pairs)]
        return launch(nproc, ["train", "--out", str(out), *options, "--", name])
    from fnrecipe import run

    return run.train(found.load(), config, out, with_changes=with_changes)
