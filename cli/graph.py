"""`fnrecipe graph RECIPE`: the train step as code, with its FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.fit import check_fit
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.cli.tables import print_products, print_table, shortened
from fnrecipe.cli.units import si
from fnrecipe.config import ShellConfig, resolve
from fnrecipe.errors import few
from fnrecipe.shell.find_recipe import find

if TYPE_CHECKING:
    from fnrecipe.compiler.cost import Cost
    from fnrecipe.inspect.parameters import Share
    from fnrecipe.recipe import Recipe


@click.command(cls=ConfigCommand, short_help="Show the train step as code, and what it costs.")
@click.argument("recipe")
@click.option("--out", type=FilePath(), metavar="DIR", help="Write the step as code to DIR/step.py.")
@config_options
def graph(recipe: str, out: Path | None, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Trace the train step of RECIPE and count its operations, FLOPs and bytes. No parameter is made, no data is read.

    Before that, tell which parameters are trained, by which optimizer, and which groups they are in.

    \b
    fnrecipe graph lm
    fnrecipe graph lm --out graphs/wide --config model.config.model_dim=512
    """
    found = find(recipe)
    config, _ = resolve(found.config, files, pairs)
    check_fit(config, found.needs, parts=("graph", "batch"))
    from fnrecipe.compiler.cost import operation_costs
    from fnrecipe.compiler.modes import jit_mode
    from fnrecipe.compiler.products import products_of
    from fnrecipe.inspect.graph import source, trace_step
    from fnrecipe.inspect.parameters import shares
    from fnrecipe.runtime import host
    from fnrecipe.runtime.products import measured
    from fnrecipe.shell.directory.lock import writing

    loaded, device = found.load(), host.pick_device(config.gang.device)
    _show_parameters(shares(loaded, config))
    step = trace_step(loaded, config, device)
    _show(loaded, config, host.device_name(device), operation_costs(step))
    print_products(measured(products_of(step, fused=jit_mode(config.trainer.jit, device) == "inductor")))
    if out is not None:
        path = out / "step.py"
        with writing(out):
            path.write_text(source(loaded, step), encoding="utf-8")
        click.echo(f"{path}: {len(step.graph.nodes):,} lines of code")
    return 0


def _show_parameters(found: Sequence[Share]) -> None:
    from rich.table import Table

    table = Table("group", "optimizer", "rate", "weight decay", "paths")
    for name in ("tensors", "parameters"):
        table.add_column(name, justify="right")
    for share in found:
        words = (share.name, share.optimizer, share.lr_scale, share.weight_decay, few(share.patterns, 6))
        table.add_row(*words, f"{share.tensors:,}", f"{share.size:,}")
    print_table(table)


def _show(recipe: Recipe[ShellConfig], config: ShellConfig, device: str, costs: dict[str, Cost]) -> None:
    from rich.table import Table

    from fnrecipe.compiler.cost import total

    whole = total(costs.values())
    table = Table(caption="bytes: read and written, as if no cache held them; views are left out", show_footer=True)
    columns = {
        "operation": "all",
        "calls": f"{whole.calls:,}",
        "FLOPs": si(whole.flops, ""),
        "share": "",
        "bytes": si(whole.bytes, "B"),
        "share ": "",
    }
    for number, (name, footer) in enumerate(columns.items()):
        table.add_column(name, footer, justify="right" if number else "left")
    for name, cost in shortened(list(costs.items()), total):
        flops = (si(cost.flops, ""), _share(cost.flops, whole.flops)) if cost.flops else ("", "")
        table.add_row(name, f"{cost.calls:,}", *flops, si(cost.bytes, "B"), _share(cost.bytes, whole.bytes))
    print_table(table)
    rows, length, count = config.dataset.batch_size, recipe.positions(config), config.gang.num_microbatches
    positions_of_row = f"{length:,} position{'s' * (length > 1)}"
    click.echo(f"a step of {recipe.name} on {device}: {rows:,} rows of {positions_of_row} in {count:,} microbatches")
    click.echo(f"graph: {si(whole.flops, 'FLOP')}, {si(whole.bytes, 'B')}, {whole.flops / whole.bytes:,.1f} FLOP a byte")
    model, positions = recipe.flops(config) if recipe.flops else None, rows * length
    if model is not None:
        share, halved = _share(positions * model.full, whole.flops), si(positions * model.causal, "FLOP")
        causal = f"; {halved} with attention halved as causal" if model.causal < model.full else ""
        click.echo(f"model: {si(positions * model.full, 'FLOP')}, {share} of the graph's{causal}")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
