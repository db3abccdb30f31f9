"""`fnrecipe export RUN --out DIR`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.options import FilePath, weights_option
from fnrecipe.cli.units import si
from fnrecipe.errors import UsageError

if TYPE_CHECKING:
    from fnrecipe.shell.trained.load import Weights

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@click.command(short_help="Write a run's model for transformers and others.")
@click.argument("run", type=FilePath())
@click.option("--out", required=True, type=FilePath(), metavar="PATH", help="The directory, or GGUF file, which is made.")
@click.option(
    "--format",
    "kind",
    default="hf",
    show_default=True,
    type=click.Choice(("hf", "gguf", "peft")),
    help="Hugging Face's, llama.cpp's, or peft's, of the adapter alone.",
)
@click.option("--step", default=None, type=click.IntRange(min=0), help="Of this checkpoint; the newest by default.")
@weights_option
@click.option("--dtype", default=None, type=click.Choice(("float32", "bfloat16", "float16")), help="By default the run's own.")
@click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Of a file of weights, at most.")
def export(run: Path, out: Path, kind: str, step: int | None, weights: Weights, dtype: str | None, shard_size: str) -> int:
    """Write the model of RUN as a directory of Hugging Face: weights in safetensors, configs, tokenizer, chat template.

    Or as one GGUF file, or the adapter alone as peft keeps it. It is there complete or not at all. The code of the run's
    recipe runs, as it does to train it.

    \b
    fnrecipe export runs/first --out first-hf --dtype bfloat16
    fnrecipe export runs/first --format gguf --out first.gguf
    fnrecipe export runs/lora --format peft --out lora-peft
    """
    limit = _size(shard_size)
    from fnrecipe.shell.trained.export import export as write
    from fnrecipe.shell.trained.export import export_adapter, export_gguf

    if kind == "gguf":
        made = export_gguf(run, out, step=step, dtype=dtype, weights=weights)
        click.echo(f"{out}: {made.tensors} tensors, {made.dtype}, {si(made.size, 'B')}; {made.tokens:,} tokens")
        return 0
    if kind == "peft":
        beside = export_adapter(run, out, step=step, dtype=dtype, weights=weights)
        click.echo(f"{out}: {beside.weights} adapted weights, {beside.parameters:,} parameters, {si(beside.size, 'B')}")
        return 0
    found = write(run, out, step=step, dtype=dtype, shard_size=limit, weights=weights)
    files = f"{found.files} file{'s' * (found.files > 1)} of weights"
    click.echo(
        f"{out}: {found.parameters:,} parameters, {found.dtype}, {files}, {si(found.size, 'B')}; {found.tokens:,} tokens"
    )
    return 0


def _size(text: str) -> int:
    """Bytes, from a number with a unit: `5GB`, `200MiB`, `1000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise UsageError(f"--shard-size: expected a size such as 5GB, found {text!r}; units: {', '.join(filter(None, _UNITS))}")
    return max(int(float(match[1]) * _UNITS[match[2]]), 1)
