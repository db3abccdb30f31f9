"""`fnrecipe train RECIPE --out DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from fnrecipe.cli.fit import check_fit, of_training, world
from fnrecipe.cli.launch import check_only_launcher, launch
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options, from_step_option, nproc_option, with_changes_option
from fnrecipe.config import resolve
from fnrecipe.runtime import garbage
from fnrecipe.runtime.launcher import meeting
from fnrecipe.shell.find_recipe import Found, find


@click.command(cls=ConfigCommand, short_help="Train a recipe, or go on with it.")
@click.argument("recipe")
@click.option("--out", required=True, type=FilePath(), metavar="DIR", help="Where everything is written.")
@nproc_option
@config_options
@with_changes_option
@from_step_option
def train(
    recipe: str,
    out: Path,
    nproc: int | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
    with_changes: bool,
    from_step: int | None,
) -> int:
    """Train RECIPE in DIR, or go on with the run that is there.

    RECIPE is the name of one that comes with fnrecipe (lm), a file that defines `recipe`, or module:attribute.

    \b
    fnrecipe train lm --out runs/first
    fnrecipe train lm --out runs/mine --config dataset.sources=data/
    """
    return start(find(recipe), out, nproc, files, pairs, with_changes, from_step)


def start(
    found: Found,
    out: Path,
    nproc: int | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
    with_changes: bool,
    from_step: int | None = None,
) -> int:
    """Trains in this process, or in `nproc` processes with this process's own command line."""
    config, _ = resolve(found.config, files, pairs)
    starts = nproc is not None and meeting() is None
    if starts:
        check_only_launcher()
    ranks, local = (nproc, nproc) if nproc is not None and starts else world()
    check_fit(config, found.needs, parts=of_training(config), ranks=ranks, local=local)
    if starts and ranks > 1:
        return launch(ranks)
    with garbage.paused():
        from fnrecipe.runtime import host
        from fnrecipe.shell import train as run

        started = host.process_started()
        return run.train(found.load(), config, out, with_changes=with_changes, from_step=from_step, started=started)
