"""`fnrecipe evaluate DIR --data PATH… | --choices FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from fnrecipe.cli.errors import show_warnings
from fnrecipe.cli.launch import check_only_launcher, launch
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options, nproc_option, weights_option
from fnrecipe.cli.tables import print_table
from fnrecipe.config.paths import expanded
from fnrecipe.errors import UsageError
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.launcher import launched, meeting

if TYPE_CHECKING:
    from fnrecipe.data.choices import Mean
    from fnrecipe.shell.trained.choices import Chosen
    from fnrecipe.shell.trained.evaluation_subject import Subject
    from fnrecipe.shell.trained.load import Weights
    from fnrecipe.shell.trained.score import Score, Scored

JSON = Mapping[str, object]


class DataCommand(ConfigCommand):
    """A command whose `--data` takes all values that follow it, as a shell makes them of `data/*.jsonl`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        following = False
        for number, arg in enumerate(args):
            if arg.startswith("-"):
                following = arg == "--data"
            elif following and args[number - 1] != "--data":
                spread.append("--data")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command(cls=DataCommand, short_help="Measure a model on text, or on questions.")
@click.argument("directory", metavar="DIR", type=FilePath())
@click.option("--data", multiple=True, metavar="PATH ...", help="Text, as dataset.sources takes it; a {path: …, …} too.")
@click.option("--choices", default=None, type=FilePath(), metavar="FILE", help="Questions, in JSON lines.")
@click.option("--step", default=None, type=click.IntRange(min=0), help="Of a run's checkpoint; the newest by default.")
@weights_option
@click.option(
    "--dtype", default=None, type=click.Choice(("float32", "bfloat16", "float16")), help="Of activations: trainer.dtype."
)
@click.option("--stride", default=None, type=click.IntRange(min=1), help="Windows of long documents, so many tokens apart.")
@click.option("--delimiter", default="", help="What stands between the context and a choice; nothing by default.")
@click.option("--out", default=None, type=FilePath(), metavar="FILE", help="JSON to be written, too.")
@nproc_option
@config_options
def evaluate(
    directory: Path,
    data: tuple[str, ...],
    choices: Path | None,
    step: int | None,
    weights: Weights,
    dtype: str | None,
    stride: int | None,
    delimiter: str,
    out: Path | None,
    nproc: int | None,
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
) -> int:
    """Measure the model in DIR, a run's directory or one of Hugging Face, on text or on multiple choice.

    Of text, every document is read once: loss, perplexity and bits per byte of each PATH and of all. Of questions, one
    {"context": …, "choices": […], "answer": index} a line: how often the right choice is the likeliest.

    \b
    fnrecipe evaluate runs/first --data stdlib: held_out/*.jsonl --out first.json
    fnrecipe evaluate smollm2/ --choices arc.jsonl --delimiter " " --nproc 2
    """
    _check_options(data, choices, stride, delimiter)
    if nproc is not None and meeting() is None:
        check_only_launcher()
        if nproc > 1:
            return launch(nproc)
    leads = launched().rank == 0
    if leads:
        show_warnings()
    sources = ", ".join(text if text.startswith("{") else json.dumps(expanded(text)) for text in data)
    brought = [*([f"dataset.sources=[{sources}]"] if data else []), *([f"trainer.dtype={dtype}"] if dtype else [])]
    from fnrecipe.shell.trained.evaluation_subject import subject

    found = subject(str(directory), step=step, weights=weights, files=files, pairs=[*brought, *pairs])
    told = _text(found, stride, leads) if choices is None else _choices(found, choices, delimiter, leads)
    if leads and out is not None:
        _write(out, told)
    return 0


def _check_options(data: tuple[str, ...], choices: Path | None, stride: int | None, delimiter: str) -> None:
    if bool(data) == (choices is not None):
        found = "both" if data else "neither"
        raise UsageError(f"evaluate: expected text to read (--data PATH) or questions (--choices FILE), found {found}")
    if choices is not None and stride is not None:
        raise UsageError("--stride: expected --data, whose long documents it is for, found --choices")
    if data and delimiter:
        raise UsageError("--delimiter: expected --choices, before which it stands, found --data")


def _text(found: Subject, stride: int | None, leads: bool) -> JSON:
    from fnrecipe.shell.trained.score import score

    scored = score(found, stride, _teller(leads))
    if leads:
        _show_scores(found, scored)
    total = {"total": _numbers(scored.total), "sources": {name: _numbers(each) for name, each in scored.sources.items()}}
    return {**_facts(found, scored.step), "max_seq_len": scored.max_seq_len, "stride": scored.stride, **total}


def _choices(found: Subject, path: Path, delimiter: str, leads: bool) -> JSON:
    from fnrecipe.shell.trained.choices import choose

    chosen = choose(found, str(path), delimiter)
    if leads:
        _show_accuracy(found, chosen)
    accuracy = chosen.accuracy
    measures = {"acc": accuracy.acc, "acc_norm": accuracy.acc_norm, "acc_centred": accuracy.centred}
    numbers = {key: value for name, each in measures.items() for key, value in _with_error(name, each).items()}
    counts = {"questions": accuracy.questions, "choices": chosen.choices, "cut": chosen.cut, "chance": accuracy.chance}
    return {**_facts(found, chosen.step), "file": str(path), **counts, **numbers}


def _show_scores(found: Subject, scored: Scored) -> None:
    from rich.table import Table

    table = Table("source")
    for name in ("loss", "perplexity", "bits per byte", "targets", "documents", "bytes"):
        table.add_column(name, justify="right")
    rows = [*scored.sources.items(), *([("all", scored.total)] if len(scored.sources) > 1 else [])]
    for name, each in rows:
        figures = (f"{each.loss:.4f}", f"{each.perplexity:,.3f}", f"{each.bits_per_byte:.4f}")
        table.add_row(name, *figures, *(f"{count:,}" for count in (each.targets, each.documents, each.bytes)))
    print_table(table)
    if scored.stride < scored.max_seq_len:
        longer = f"is scored in windows {scored.stride:,} tokens apart"
    else:
        longer = "is cut, and each piece scored from its own beginning"
    length = f"rows of {scored.max_seq_len:,} tokens; a longer document {longer}"
    click.echo(f"{_origin(found, scored.step)}, {found.config.trainer.dtype}: {length}")


def _show_accuracy(subject: Subject, chosen: Chosen) -> None:
    found = chosen.accuracy
    for name, each, note in (
        ("acc", found.acc, "by the log-likelihood of a choice"),
        ("acc_norm", found.acc_norm, "by that a byte of it"),
        ("acc_centred", found.centred, f"acc, of which chance, {found.chance:.4f}, counts as 0"),
    ):
        click.echo(f"{name:12}{each.value:.4f} ± {each.stderr:.4f}  {note}")
    fits = f"{chosen.cut:,} of them behind a context that was cut to {subject.config.dataset.max_seq_len:,} tokens"
    counts = f"{found.questions:,} questions with {chosen.choices:,} choices, {fits}"
    click.echo(f"{_origin(subject, chosen.step)}, {subject.config.trainer.dtype}: {counts}")


def _origin(found: Subject, step: int | None) -> str:
    return f"{found.directory}" + ("" if step is None else f", step {step:,}")


def _facts(found: Subject, step: int | None) -> dict[str, object]:
    return {"model": str(found.directory), "step": step, "weights": found.weights, "dtype": found.config.trainer.dtype}


def _numbers(found: Score) -> dict[str, float]:
    keys = ("loss", "perplexity", "bits_per_byte", "targets", "documents", "bytes")
    return {key: getattr(found, key) for key in keys}


def _with_error(name: str, found: Mean) -> dict[str, float]:
    return {name: found.value, f"{name}_stderr": found.stderr}


def _teller(leads: bool) -> Callable[[str], None]:
    """Names each source on a terminal when it begins."""
    quiet = not leads or not sys.stderr.isatty()
    return lambda name: None if quiet else click.secho(f"{name} …", err=True, dim=True)


def _write(out: Path, values: JSON) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, orjson.dumps(values, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except OSError as error:
        raise UsageError(f"{out}: cannot write: {error.strerror or error}") from None
