"""`fnrecipe profile RECIPE --out DIR`: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.fit import check_fit, of_training
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.cli.tables import print_products, print_table, shortened
from fnrecipe.cli.units import duration, si
from fnrecipe.config import resolve
from fnrecipe.shell.find_recipe import find

if TYPE_CHECKING:
    from fnrecipe.inspect.profile import Profile


@click.command(cls=ConfigCommand, short_help="Measure where the time of a step goes.")
@click.argument("recipe")
@click.option("--out", required=True, type=FilePath(), metavar="DIR", help="Where the traces are written.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Measure N steps.", metavar="N")
@config_options
def profile(recipe: str, out: Path, steps: int, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Train RECIPE for some steps that nobody keeps, and measure them: first as they are, then under torch's profiler.

    Writes DIR/trace.json, for chrome://tracing or https://ui.perfetto.dev, and on a GPU DIR/memory.pickle, for
    https://pytorch.org/memory_viz.

    \b
    fnrecipe profile lm --out profiles/first
    """
    found = find(recipe)
    config, _ = resolve(found.config, files, pairs)
    check_fit(config, found.needs, parts=of_training(config))
    from fnrecipe.inspect.profile import MEMORY, TRACE, WARM_UP
    from fnrecipe.inspect.profile import profile as measure

    click.echo(f"{WARM_UP} steps to warm up, {steps} without and {steps} under the profiler", err=True)
    _show(measure(found.load(), config, out, steps))
    for path in (out / TRACE, out / MEMORY):
        if path.exists():
            click.echo(f"{path}: {si(path.stat().st_size, 'B')}")
    return 0


def _show(found: Profile) -> None:
    from rich.table import Table

    table = Table("operation", caption="of a step under the profiler; in an operation itself, not in those that it calls")
    for name in ("calls", "time", "share"):
        table.add_column(name, justify="right")
    rows = [(operation.name, (operation.calls, operation.seconds)) for operation in found.operations]
    for name, (calls, seconds) in shortened(rows, _sums):
        table.add_row(name, f"{calls:,.0f}", duration(seconds), f"{seconds / found.seconds:.1%}")
    print_table(table)
    print_products(found.products)
    for name, fact in _facts(found).items():
        click.echo(f"{name:<13}{fact}")


def _sums(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return sum(first), sum(second)


def _facts(found: Profile) -> dict[str, str]:
    speed = found.speed
    facts = {
        "device": found.device,
        "step": f"{duration(1 / speed.steps_per_second)}; {duration(found.seconds)} under the profiler",
        "speed": f"{speed.tokens_per_second:,.0f} tokens/s; {speed.positions_per_second:,.0f} positions/s with padding",
    }
    if speed.model_flops_per_second is not None and speed.causal_model_flops_per_second is not None:
        full, causal = (si(flops, "FLOP/s") for flops in (speed.model_flops_per_second, speed.causal_model_flops_per_second))
        facts["model"] = full if causal == full else f"{full}; {causal} with attention halved as causal"
    if speed.mfu is not None and speed.causal_mfu is not None:
        halved = f"; {speed.causal_mfu:.1%} with attention halved as causal" if speed.causal_mfu != speed.mfu else ""
        facts["MFU"] = f"{speed.mfu:.1%}{halved}"
    facts["data wait"] = f"{speed.data_wait:.1%} of the time"
    facts["idle"] = f"{1 - found.busy:.1%} of the time under the profiler, in which no operation ran"
    return facts
