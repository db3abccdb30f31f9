"""`fnrecipe lr-find RUN|RECIPE`: the loss at a learning rate that grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fnrecipe.cli.errors import show_warnings
from fnrecipe.cli.fit import check_fit, of_training
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.shell.find_recipe import find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fnrecipe.checkpoint import Checkpoint
    from fnrecipe.recipe import Recipe

RATE = click.FloatRange(min=0, min_open=True)
_ONE_PROCESS = ("gang.sharding=replicate", "gang.shard_size=null", "gang.tensor_parallel_size=1")
"""Of a run's config, over what its processes have cut: here is one."""


@click.command(name="lr-find", cls=ConfigCommand, short_help="Find a learning rate.")
@click.argument("subject", metavar="RUN|RECIPE")
@click.option("--out", required=True, type=FilePath(), metavar="DIR", help="Where the table and the picture are written.")
@click.option("--start", type=RATE, help="The first rate; a thousandth of optimizer.config.lr by default.")
@click.option("--end", type=RATE, help="The last rate; a thousand times optimizer.config.lr by default.")
@click.option("--steps", default=100, show_default=True, type=click.IntRange(min=3), metavar="N", help="Train for N steps.")
@click.option("--step", default=None, type=click.IntRange(min=0), help="Of a run's checkpoint; the newest by default.")
@config_options
def lr_find(
    subject: str,
    out: Path,
    start: float | None,
    end: float | None,
    steps: int,
    step: int | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
) -> int:
    """Train RECIPE, or go on with RUN, for some steps that nobody keeps, at a learning rate that grows until the loss diverges.

    RUN, the output directory of a run, is left as it is: training goes on from its checkpoint, on the rows that follow.
    Writes DIR/lr_find.csv and DIR/lr_find.svg, the loss at each rate.

    \b
    fnrecipe lr-find lm --out sweeps/lm
    fnrecipe lr-find runs/first --out sweeps/first --start 1e-5 --end 1
    """
    show_warnings()
    is_run = (Path(subject) / "config.yaml").is_file()
    if step is not None and not is_run:
        raise UsageError(f"--step: expected the directory of a run, found {subject}")
    recipe, config, found = _of_run(Path(subject), step, files, pairs) if is_run else _of_recipe(subject, files, pairs)
    from fnrecipe.inspect import lr_find as sweeps

    lr = sweeps.peak(recipe, config)
    first, last = start or lr / 1000, end or lr * 1000
    if first >= last:
        raise UsageError(f"--end: expected a rate above the first one, {first:g}, found {last:g}")
    click.echo(f"{steps:,} steps at rates from {first:.3g} to {last:.3g}; the config has {lr:g}", err=True)
    sweep = sweeps.lr_find(recipe, config, (first, last), steps=steps, begin=found)
    sweeps.write(sweep, out)
    ended = f"diverged at {sweep.rates[-1]:.3g}" if sweep.diverged else f"did not diverge up to {sweep.rates[-1]:.3g}"
    click.echo(f"steepest    {sweep.steepest:.3g}  where the loss falls most for the same factor")
    click.echo(f"lowest/10   {sweep.lowest / 10:.3g}  a tenth of the rate at which the loss is least, {sweep.lowest:.3g}")
    click.echo(f"{ended}; {out / sweeps.TABLE}, {out / sweeps.PICTURE}")
    return 0


def _of_recipe(name: str, files: Sequence[Path], pairs: Sequence[str]) -> tuple[Recipe[Any], Any, None]:
    found = find(name)
    config, _ = resolve(found.config, files, pairs)
    check_fit(config, found.needs, parts=of_training(config))
    return found.load(), config, None


def _of_run(out: Path, step: int | None, files: Sequence[Path], pairs: Sequence[str]) -> tuple[Recipe[Any], Any, Checkpoint]:
    from fnrecipe.checkpoint import of_run
    from fnrecipe.shell.directory.layout import CONFIG
    from fnrecipe.shell.directory.recorded_recipe import recorded_recipe

    recipe = recorded_recipe(out)
    config, _ = resolve(recipe.config, [out / CONFIG, *files], [*_ONE_PROCESS, *pairs])
    check_fit(config, recipe.needs, parts=of_training(config))
    return recipe, config, of_run(out, step)
