"""`fnrecipe data show|stats|cache|score RECIPE`: the data that a recipe trains on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from fnrecipe.cli.errors import show_warnings
from fnrecipe.cli.fit import check_fit
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options
from fnrecipe.cli.tables import print_table
from fnrecipe.cli.units import si
from fnrecipe.config import ShellConfig, resolve
from fnrecipe.errors import UsageError
from fnrecipe.shell.find_recipe import find

if TYPE_CHECKING:
    from fnrecipe.data import Batch, Corpus, Source, Tokenizer
    from fnrecipe.recipe import Recipe


T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., object])

STREAM = ("batch", "stream")


@click.group(short_help="Look at what a recipe trains on.")
def data() -> None:
    """Look at the rows that a recipe trains on, count them, tokenise them ahead of time, or score them by a frozen model."""


def _split_option(command: Command) -> Command:
    return click.option("--valid", is_flag=True, help="The validation documents, not the training ones.")(command)


@data.command(cls=ConfigCommand, short_help="Print rows as text.")
@click.argument("recipe")
@click.option("--rows", default=4, show_default=True, type=click.IntRange(min=1), help="How many rows.")
@_split_option
@config_options
def show(recipe: str, rows: int, valid: bool, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Print the first rows that RECIPE trains on as text, the pieces of documents in turning colours.

    Where only a part of a piece is trained, it stands in ⟦brackets⟧, and special tokens by their names.
    """
    from fnrecipe.data.survey import NO_ROW
    from fnrecipe.data.tokenizer import describe

    found, config = _load(recipe, files, pairs, STREAM)
    show_warnings()
    tokenizer, shown = _needed(found, "tokenizer", found.tokenizer)(config), 0
    names = [corpus.name for corpus in _corpora(found, config)]
    for batch, _ in _stream(found, config, valid)(None):
        if not shown:
            click.secho(f"tokenizer: {describe(tokenizer)}", dim=True)
        for row in range(len(batch.tokens))[: rows - shown]:
            _show_row(batch, row, tokenizer, names)
            shown += 1
        if shown == rows:
            return 0
    if not shown:
        raise UsageError(NO_ROW)
    return 0


@data.command(cls=ConfigCommand, short_help="Count documents, tokens and padding.")
@click.argument("recipe")
@click.option("--documents", default=None, type=click.IntRange(min=1), help="Count the first N documents of each source only.")
@click.option("--batches", default=200, show_default=True, type=click.IntRange(min=1), help="Measure the rows of N batches.")
@_split_option
@config_options
def stats(
    recipe: str, documents: int | None, batches: int, valid: bool, files: tuple[Path, ...], pairs: tuple[str, ...]
) -> int:
    """Count the documents of each source of RECIPE, and measure padding and speed of its rows."""
    import numpy as np
    from rich.table import Table

    from fnrecipe.data.survey import NO_ROW, fill, survey
    from fnrecipe.data.tokenizer import loss

    found, config = _load(recipe, files, pairs, STREAM)
    tokenizer = _needed(found, "tokenizer", found.tokenizer)(config)
    columns = ("source", "files", "size", "documents", "bad", "tokens", "bytes/token", "median", "90 %", "longest", "> row")
    table = Table(*columns, caption="lengths in tokens; > row: share of documents longer than a row")
    warnings: list[str] = []
    for corpus in _corpora(found, config):
        counted = survey(corpus, tokenizer, documents)
        tokens = int(counted.lengths.sum())
        middle, high, longest = np.quantile(counted.lengths, [0.5, 0.9, 1.0]) if len(counted.lengths) else (0, 0, 0)
        longer = float((counted.lengths > config.dataset.max_seq_len).mean()) if len(counted.lengths) else 0.0
        table.add_row(
            corpus.name,
            f"{len(corpus.files):,}",
            si(sum(file.size for file in corpus.files), "B"),
            f"{len(counted.lengths):,}",
            f"{len(counted.bad):,}",
            f"{tokens:,}",
            f"{counted.num_bytes / max(tokens, 1):.2f}",
            *(f"{value:,.0f}" for value in (middle, high, longest)),
            f"{longer:.1%}",
        )
        warnings += [f"bad record: {error}" for error in counted.bad[:10]]
        warnings += [loss(corpus.name, counted.lost, counted.num_bytes + counted.lost)] if counted.lost else []
    print_table(table)
    for warning in warnings:
        click.echo(warning, err=True)
    logging.getLogger("fnrecipe").addHandler(logging.NullHandler())  # the stream reports the same records in each epoch
    source, started = _stream(found, config, valid), (time.perf_counter(), time.process_time())
    rows = fill(batch for batch, _ in islice(source(None), batches))
    seconds, busy = time.perf_counter() - started[0], time.process_time() - started[1]
    if not rows.rows:
        raise UsageError(NO_ROW)
    click.echo(
        f"{rows.rows:,} rows: {rows.pieces / rows.rows:.1f} pieces a row, "
        f"{1 - rows.tokens / rows.positions:.2%} padding; {rows.tokens / seconds:,.0f} tokens/s, "
        f"{rows.tokens / busy:,.0f} a CPU second"
        + (f"; {rows.targets / rows.tokens:.2%} of the targets are trained" if rows.targets < rows.tokens else "")
    )
    return 0


@data.command(cls=ConfigCommand, short_help="Tokenise everything once.")
@click.argument("recipe")
@config_options
def cache(recipe: str, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Tokenise all sources of RECIPE into the folder `dataset.cache`; what is there already is only read."""
    from rich.console import Console
    from rich.progress import track

    from fnrecipe.data.survey import read_through

    found, config = _load(recipe, files, pairs, ())
    folder = getattr(config.dataset, "cache", None)
    if folder is None:
        raise UsageError("dataset.cache: expected a folder for the tokens, found null (--config dataset.cache=DIR)")
    console, started = Console(stderr=True), time.perf_counter()
    for corpus in _corpora(found, config):
        blocks = track(read_through(corpus), corpus.name, len(corpus.blocks), console=console, disable=not console.is_terminal)
        documents = sum(count for _, count in blocks)
        click.echo(f"{corpus.name}: {documents:,} documents in {len(corpus.blocks):,} blocks")
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    click.echo(f"{folder}: {si(size, 'B')} after {time.perf_counter() - started:.1f} s")
    return 0


@data.command(cls=ConfigCommand, short_help="Score preferences by the reference model once.")
@click.argument("recipe")
@click.option("--out", required=True, type=FilePath(), metavar="FILE", help="JSON lines to be written.")
@config_options
def score(recipe: str, out: Path, files: tuple[Path, ...], pairs: tuple[str, ...]) -> int:
    """Write the records of all sources of RECIPE into FILE, each with the log-probabilities of the reference model.

    Where RECIPE then trains on FILE with reference.precomputed=true, that model is neither kept nor asked.
    """
    import orjson

    from fnrecipe.runtime.files import written
    from fnrecipe.runtime.host import pick_device, set_threads

    found, config = _load(recipe, files, pairs, ())
    scored = _needed(found, "scored", found.scored)
    show_warnings()
    set_threads(config.common.torch.num_threads)
    count, started = 0, time.perf_counter()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written(out) as file:
            for record in scored(config, pick_device(config.gang.device)):
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                count += 1
    except OSError as error:
        raise UsageError(f"{out}: cannot write: {error.strerror or error}") from None
    click.echo(f"{out}: {count:,} records after {time.perf_counter() - started:.1f} s")
    return 0


def _load(
    recipe: str, files: tuple[Path, ...], pairs: tuple[str, ...], parts: Sequence[str]
) -> tuple[Recipe[ShellConfig], ShellConfig]:
    found = find(recipe)
    config, _ = resolve(found.config, files, pairs)
    check_fit(config, found.needs, parts=parts)
    return found.load(), config


def _needed(recipe: Recipe[ShellConfig], field: str, value: T | None) -> T:
    if value is None:
        raise UsageError(f"{recipe.name}: this recipe has no `{field}`, which `fnrecipe data` needs")
    return value


def _corpora(recipe: Recipe[ShellConfig], config: ShellConfig) -> Sequence[Corpus]:
    from fnrecipe.data import tell_left_out

    corpora = _needed(recipe, "corpora", recipe.corpora)(config)
    tell_left_out(corpora)
    return corpora


def _stream(recipe: Recipe[ShellConfig], config: ShellConfig, valid: bool) -> Source[Batch]:
    from fnrecipe.data import LaneAssignment

    if not valid:
        return recipe.stream(config, LaneAssignment())
    from fnrecipe.recipe import Evaluation

    found = recipe.evaluations(config).get("valid")
    evaluation = _needed(recipe, "evaluations['valid']", found if isinstance(found, Evaluation) else None)
    return evaluation.stream(config, LaneAssignment())


def _show_row(batch: Batch, row: int, tokenizer: Tokenizer, names: list[str]) -> None:
    from fnrecipe.data.judged import VERDICTS, JudgedBatch

    segments, length = batch.segments[row], len(batch.segments[row])
    pieces, used = int(segments.max()) + 1, int((segments >= 0).sum())
    click.secho(f"row {row}: {used:,} of {length:,} positions in {pieces} piece{'s' * (pieces > 1)}", bold=True)
    for piece in range(pieces):
        here, colour = segments == piece, ("cyan", "yellow", "green", "magenta")[piece % 4]
        ids = [*batch.tokens[row][here].tolist(), int(batch.targets[row][here][-1])]
        trained = [False, *batch.mask[row][here].tolist()]
        source, count = names[int(batch.sources[row][here][0])], len(ids) - 1
        verdict = f"{VERDICTS[int(batch.verdicts[row][piece])]}, " if isinstance(batch, JudgedBatch) else ""
        click.secho(
            f"── {source}, {verdict}" + (f"{sum(trained):,} of " * (sum(trained) < count)) + f"{count:,} targets", dim=True
        )
        if sum(trained) == count:
            click.secho(tokenizer.decode(ids), fg=colour)
        else:
            _show_trained(ids, trained, tokenizer, colour)


def _show_trained(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer, colour: str) -> None:
    """A piece with special tokens by their names; what is trained stands in brackets, and in a colour."""
    from fnrecipe.data.tokenizer import spelled

    for is_trained, run in groupby(zip(ids, trained, strict=True), lambda item: item[1]):
        text = spelled(tokenizer, [number for number, _ in run])
        click.secho(f"⟦{text}⟧" if is_trained else text, fg=colour if is_trained else None, nl=False)
    click.echo()
