"""`fnrecipe resume DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fnrecipe.cli.options import ConfigCommand, FilePath, config_options, from_step_option, nproc_option, with_changes_option
from fnrecipe.cli.train import start
from fnrecipe.config.layers import merge, read_file, read_pair
from fnrecipe.errors import REDACTED, UsageError, few
from fnrecipe.shell.directory.recorded_recipe import CONFIG, instead, recorded


@click.command(cls=ConfigCommand, short_help="Go on with a run.")
@click.argument("out", metavar="DIR", type=FilePath())
@from_step_option
@nproc_option
@config_options
@with_changes_option
def resume(
    out: Path, from_step: int | None, nproc: int | None, files: tuple[Path, ...], pairs: tuple[str, ...], with_changes: bool
) -> int:
    """Go on with the run in DIR, by the recipe that its run.json names and its config.yaml, on any number of processes.

    What `fnrecipe train` would allow in DIR may be changed by --config: more steps, and how it is computed.

    \b
    fnrecipe resume runs/first
    fnrecipe resume runs/first --config regime.num_steps=2000
    fnrecipe resume runs/first --from-step 500
    """
    found = recorded(out, f"go on by `fnrecipe train RECIPE --out {out} --config-file {out / CONFIG}`")
    if not (out / CONFIG).is_file():
        raise UsageError(f"{out}: expected the output directory of a run, found {instead(out, CONFIG)}")
    _check_secrets(out, files, pairs)
    return start(found, out, nproc, (out / CONFIG, *files), pairs, with_changes, from_step)


def _check_secrets(out: Path, files: Sequence[Path], pairs: Sequence[str]) -> None:
    """Checks that no value of the run's config is taken whose secrets were not written.

    Raises:
        UsageError: if one is, which has to be given again.
    """
    layers = [*map(read_file, files), *map(read_pair, pairs)]
    layer = merge([read_file(out / CONFIG, bounded=False), *layers])
    marks = (f"//{REDACTED}@", f"={REDACTED}")
    hidden = [path for path, entry in layer.items() if any(mark in str(entry.value) for mark in marks)]
    if hidden:
        advice = f"give the whole value by --config {hidden[0]}=..."
        raise UsageError(f"{out / CONFIG}: expected an address in {few(hidden)}, found one without its secret; {advice}")
