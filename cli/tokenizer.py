"""`fnrecipe tokenizer train`."""

from __future__ import annotations

import shlex
import sys
from itertools import chain
from pathlib import Path

import click

from fnrecipe.cli.options import FilePath
from fnrecipe.config.paths import expanded
from fnrecipe.data.formats import FORMATS
from fnrecipe.errors import UsageError

FORMAT_NAMES = ("auto", *FORMATS)


@click.group(short_help="Make a tokenizer.")
def tokenizer() -> None:
    """Make a tokenizer."""


@tokenizer.command(short_help="Train a byte-level BPE.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", required=True, type=FilePath(), metavar="FILE", help="The tokenizer.json to write.")
@click.option("--vocab-size", default=32000, show_default=True, type=click.IntRange(min=257), help="Tokens in all.")
@click.option("--special-token", "special", multiple=True, help="A token that text never gives; the first ends documents.")
@click.option(
    "--format", "format_", default="auto", type=click.Choice(FORMAT_NAMES), help="Of the files; auto: by their suffix."
)
@click.option("--text-key", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--separator", default=None, help="What stands between the documents of plain text.")
def train(
    paths: tuple[str, ...],
    out: Path,
    vocab_size: int,
    special: tuple[str, ...],
    format_: str,
    text_key: str,
    separator: str | None,
) -> int:
    """Train a byte-level BPE on files, directories, globs or addresses, as `dataset.sources` takes them; `stdlib:` too.

    \b
    fnrecipe tokenizer train data/ --out tokenizer.json --vocab-size 32000
    """
    from fnrecipe.data import Reading, byte_tokenizer, open_corpus
    from fnrecipe.data.corpus import tell_left_out, texts_of
    from fnrecipe.data.huggingface import train_bpe
    from fnrecipe.data.tokenizer import END_OF_TEXT

    if len(special) + 256 > vocab_size:
        raise UsageError(
            f"--vocab-size: expected at least {len(special) + 256} for 256 bytes and special tokens, found {vocab_size}"
        )
    if short := [token for token in special if len(token) < 2]:
        raise UsageError(f"--special-token: expected two characters at least, found {short[0]!r}: text needs every single one")
    reading = Reading(text_key, separator)
    form = None if format_ == "auto" else format_
    corpora = [open_corpus(expanded(path), byte_tokenizer(), format=form, reading=reading) for path in paths]
    tell_left_out(corpora)
    texts = chain.from_iterable(map(texts_of, corpora))
    first = next(texts, None)
    if first is None:
        raise UsageError(f"{', '.join(paths)}: expected text to train on, found none")
    trained = train_bpe(chain([first], texts), vocab_size, special or [END_OF_TEXT], show_progress=sys.stderr.isatty())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(trained.to_str(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: cannot write the tokenizer: {error.strerror}") from None
    size = trained.get_vocab_size()
    pairs = ["tokenizer.family=hf", f"tokenizer.path={out}", f"model.config.vocab_size={size}"]
    pairs += [f"tokenizer.eos_token={token}" for token in special[:1]]
    click.echo(f"{out}: {size:,} tokens; use it by --config {shlex.join(pairs)}")
    return 0
