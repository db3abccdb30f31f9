"""`fnrecipe tokenizer train`."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

from fnrecipe.errors import UsageError

FORMATS = ("auto", "jsonl", "parquet", "text", "python")


@click.group(short_help="Make a tokenizer.")
def tokenizer() -> None:
    """Make a tokenizer."""


@tokenizer.command(short_help="Train a byte-level BPE.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The tokenizer.json to write.")
@click.option("--vocab-size", default=32000, show_default=True, type=click.IntRange(min=257), help="Tokens in all.")
@click.option("--special-token", "special", multiple=True, help="A token that text never gives; the first ends documents.")
@click.option("--format", "format_", default="auto", type=click.Choice(FORMATS), help="Of the files; auto: by their suffix.")
@click.option("--text-key", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--separator", default=None, help="What stands between the documents of plain text.")
def train(
    paths: tuple[str, ...],
    out: Path,
    vocab_size: int,
    special: tuple[str, ...],
    format_: Any,
    text_key: str,
    separator: str | None,
) -> int:
    """Train a byte-level BPE on files, directories, globs or addresses, as `dataset.sources` takes them; `stdlib:` too.

    \b
    fnrecipe tokenizer train data/ --out tokenizer.json --vocab-size 32000
    """
    from fnrecipe.data import Reading, byte_tokenizer, open_corpus
    from fnrecipe.data.corpus import texts_of
    from fnrecipe.data.tokenizer import END_OF_TEXT, train_bpe

    if len(special) + 256 > vocab_size:
        raise UsageError(
            f"--vocab-size: expected at least {len(special) + 256} for 256 bytes and special tokens, found {vocab_size}"
        )
    reading = Reading(text_key, separator)
    form = None if format_ == "auto" else format_
    corpora = [open_corpus(path, byte_tokenizer(), format=form, reading=reading) for path in paths]
    trained = train_bpe(
        chain.from_iterable(map(texts_of, corpora)), vocab_size, special or [END_OF_TEXT], show_progress=sys.stderr.isatty()
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(trained.to_str(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: cannot write the tokenizer: {error.strerror}") from None
    click.echo(f"{out}: {trained.get_vocab_size():,} tokens; use it by --config tokenizer.family=hf tokenizer.path={out}")
    return 0
