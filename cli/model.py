"""`fnrecipe model list|show|import`: models that come with fnrecipe, and those in directories."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fnrecipe.cli.fit import check_fit
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.cli.tables import print_table
from fnrecipe.cli.units import si
from fnrecipe.config import resolve, unstructure
from fnrecipe.config.find import find_component, known
from fnrecipe.config.layers import flatten, values
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.errors import UsageError, few
from fnrecipe.shell.find_recipe import find, presets


@click.group(short_help="Look at models, and bring one here.")
def model() -> None:
    """Look at models that have a name, or lie in a directory, and make a run of one."""


@model.command("list", short_help="Print families and architectures.")
def list_() -> int:
    """Print the families of models, transformers' name for each, and their architectures with their parameters.

    Those with a preset have a whole training config: --config-file preset:NAME.
    """
    from rich.table import Table

    table = Table("family", "model_type", "architecture", "parameters", "layers", "width", "context", "preset")
    for name in known(FAMILIES):
        family = find_component(name, FAMILIES)
        there = family.hugging_face.model_type if family.hugging_face else "-"
        for arch, config in family.archs.items():
            sizes = [getattr(config, key, None) for key in ("num_layers", "model_dim", "max_seq_len")]
            count = "" if family.parameters is None else f"{sum(family.parameters(config)):,}"
            preset = f"preset:{arch}" if arch in presets() else ""
            table.add_row(name, there, arch, count, *("" if size is None else f"{size:,}" for size in sizes), preset)
    print_table(table)
    return 0


@model.command(short_help="Print what a directory holds.")
@click.argument("path", metavar="DIR", type=FilePath())
def show(path: Path) -> int:
    """Print family, shape, dtype, files and tokenizer of the model in DIR: a directory of Hugging Face, or of a run.

    Weights are not read, and nothing in DIR is executed. What is wrong with it is told, and makes the exit status 2.
    """
    from fnrecipe.interop.survey import survey

    found = survey(str(path))
    size = sum(found.files.values())
    lines = {
        "family": f"{found.described.family} ({found.described.source})",
        "parameters": f"{found.parameters:,}",
        "dtype": found.dtype or "unknown",
        "files": f"{few(list(found.files), 3)}; {si(size, 'B')}" if found.files else "none that can be used",
        "tokenizer": found.tokenizer or "none",
    }
    for key, text in lines.items():
        click.echo(f"{key + ':':12}{text}")
    click.echo("config:")
    for key, value in values(flatten(unstructure(found.described.config), "")).items():
        click.echo(f"  {key}: {json.dumps(value)}")
    if found.problems:
        raise UsageError("\n".join(found.problems))
    return 0


@model.command("import", cls=ConfigCommand, short_help="Make a run of a directory.")
@click.argument("path", metavar="DIR", type=FilePath())
@click.option("--out", required=True, type=FilePath(), metavar="RUN", help="The directory of the run, which is made.")
@click.option("--recipe", default="lm", show_default=True, help="The recipe of the run.")
@config_options
def import_(path: Path, out: Path, recipe: str, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Make RUN, a run at step 0 whose checkpoint has the weights in DIR: a directory of Hugging Face, or of a run.

    Weights keep their dtype: model.dtype is bfloat16 where all of them are, else float32.

    \b
    fnrecipe model import smollm2/ --out runs/smollm2 --config dataset.sources=data/
    fnrecipe train lm --out runs/smollm2 --config-file runs/smollm2/config.yaml
    """
    from fnrecipe.interop.survey import weights_dtype

    brought = [f"model.path={json.dumps(str(path))}", f"model.dtype={weights_dtype(str(path))}"]
    found = find(recipe)
    config, _ = resolve(found.config, files, [*brought, *pairs])
    check_fit(config, found.needs, parts=["state"])
    from fnrecipe.shell.trained.export import import_model

    written = import_model(found.load(), config, out)
    click.echo(f"{written}: {config.model.family}, {config.model.dtype}, from {path}")
    return 0
