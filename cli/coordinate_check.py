"""`fnrecipe coordinate-check RECIPE`: whether what steps change depends on the width, or the depth, of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.cli.tables import print_table
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.shell.find_recipe import find

if TYPE_CHECKING:
    from fnrecipe.inspect.coordinates import Along, Coordinates


@click.command(cls=ConfigCommand, short_help="Check whether learning rates transfer over widths or depths.")
@click.argument("recipe")
@click.option("--widths", metavar="N,N,…", help="Values of model.config.model_dim; heads keep their width.")
@click.option("--depths", metavar="N,N,…", help="Values of model.config.num_layers.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(min=1), help="Train each for N steps.", metavar="N")
@click.option("--out", type=FilePath(), metavar="FILE", help="Draw the means over the sizes, a line for each step, as an SVG.")
@config_options
def coordinate_check(
    recipe: str,
    widths: str | None,
    depths: str | None,
    steps: int,
    out: Path | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
) -> int:
    """Train models of RECIPE that differ in width, or depth, for some steps at the peak rate, and print means of |x|.

    The slope is that of log mean over log size: near 0 where one learning rate is right for all sizes (model.transfer).

    \b
    fnrecipe coordinate-check lm --widths 128,256,512 --config model.transfer.name=mup model.transfer.base_width=256
    """
    along: Along = "width" if widths is not None else "depth"
    if (widths is None) == (depths is None):
        raise UsageError(f"--widths, --depths: expected one of them, found {'none' if widths is None else 'both'}")
    sizes = _sizes(f"--{along}s", widths or depths or "")
    found = find(recipe)
    config, _ = resolve(found.config, files, pairs)
    from fnrecipe.inspect.coordinates import coordinates
    from fnrecipe.shell.directory.lock import writing

    measured = coordinates(found.load(), config, along, sizes, steps)
    _show(measured, along, steps)
    if out is not None:
        with writing(out.parent):
            out.write_text(_drawn(measured, along), encoding="utf-8")
        click.echo(f"{out}: an SVG")
    return 0


def _sizes(option: str, text: str) -> list[int]:
    words = text.split(",")
    sizes = {int(word) for word in words if word.strip().isdecimal() and int(word)}
    if len(sizes) < max(2, len(words)):
        raise UsageError(f"{option}: expected two or more different integers of at least 1, as in 128,256,512, found {text}")
    return sorted(sizes)


def _show(found: Sequence[Coordinates], along: str, steps: int) -> None:
    from rich.table import Table

    from fnrecipe.inspect.coordinates import QUANTITIES, slope

    table = Table(f"mean |x| behind {steps} step{'s' * (steps > 1)}, by {along}")
    for each in found:
        table.add_column(f"{each.size:,}", justify="right")
    table.add_column("slope", justify="right")
    for name in QUANTITIES:
        table.add_row(name, *(f"{each.means[name][-1]:.3g}" for each in found), f"{slope(found, name):+.2f}")
    print_table(table)


def _drawn(found: Sequence[Coordinates], along: str) -> str:
    from fnrecipe.inspect.chart import Chart, Line, svg
    from fnrecipe.inspect.coordinates import QUANTITIES

    def lines(name: str) -> list[Line]:
        steps = range(int(name.startswith("change")), len(found[0].means[name]))
        return [Line(f"step {step}", [(each.size, each.means[name][step]) for each in found]) for step in steps]

    return svg(*(Chart(lines=lines(name), x=along, y=f"mean |{name}|", log_x=True, log_y=True) for name in QUANTITIES))
