"""`fnrecipe tokenizer train|show`."""

from __future__ import annotations

import os
import shlex
import sys
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.options import FilePath
from fnrecipe.config.paths import expanded
from fnrecipe.data.formats import FORMATS
from fnrecipe.data.open_tokenizer import FAMILIES
from fnrecipe.data.tiktoken_patterns import PATTERNS
from fnrecipe.errors import UsageError, few, one_line

if TYPE_CHECKING:
    from fnrecipe.data import Tokenizer
    from fnrecipe.data.chat_template import Chat

FORMAT_NAMES = ("auto", *FORMATS)


@click.group(short_help="Make a tokenizer, or look at one.")
def tokenizer() -> None:
    """Make a tokenizer, or look at one and at its chat template."""


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


@tokenizer.command(short_help="Print what a tokenizer makes of a text or a chat.")
@click.argument("path", metavar="PATH")
@click.option("--family", default=None, type=click.Choice(FAMILIES[1:]), help="Of the tokenizer; without it, by the file.")
@click.option("--pattern", default=None, type=click.Choice(list(PATTERNS)), help="How a rank file's text is cut.")
@click.option("--special-token", "special", multiple=True, help="A token that follows the ranks of a rank file.")
@click.option("--bos-token", default=None, help="The token that begins documents.")
@click.option("--eos-token", default=None, help="The token that ends documents.")
@click.option("--text", default=None, help="A text, of which each token is printed.")
@click.option("--messages", default=None, type=FilePath(), metavar="FILE", help="A chat as JSON: a list of messages.")
@click.option("--template", default=None, metavar="PATH", help="The chat template; without it, that of PATH.")
def show(
    path: str,
    family: str | None,
    pattern: str | None,
    special: tuple[str, ...],
    bos_token: str | None,
    eos_token: str | None,
    text: str | None,
    messages: Path | None,
    template: str | None,
) -> int:
    """Print the size and the special tokens of the tokenizer at PATH, and what it makes of a text or of a chat.

    \b
    fnrecipe tokenizer show models/qwen --messages chat.json
    """
    from fnrecipe.data.open_tokenizer import open_tokenizer
    from fnrecipe.data.tokenizer import describe, spelled

    path = expanded(path)
    found = open_tokenizer(
        family or _family(path, pattern),
        path,
        bos_token=bos_token,
        eos_token=eos_token,
        pattern=pattern,
        special_tokens=special,
    )
    chat = None if messages is None else _read_chat(found, messages, expanded(template or path))
    click.echo(f"{path}: {describe(found)}, {found.fingerprint}")
    names = [f"{name} ({number})" for name, number in sorted(found.special.items(), key=lambda item: item[1])]
    click.echo(f"special tokens: {few(names, 40)}")
    if text is not None:
        (ids,) = found.encode([text])
        click.echo(f"{len(ids):,} tokens for {len(text.encode()):,} bytes")
        for number in ids.tolist():
            click.echo(f"{number:>8}  {spelled(found, [number])!r}")
    if chat is not None:
        click.echo(f"{len(chat.ids):,} tokens, {int(chat.trained.sum()):,} of them trained (>)")
        for trained, run in groupby(zip(chat.trained.tolist(), chat.ids.tolist(), strict=True), itemgetter(0)):
            click.echo(f"{'>' if trained else ' '} {spelled(found, [number for _, number in run])!r}")
    return 0


def _read_chat(tokenizer: Tokenizer, messages: Path, template: str) -> Chat:
    """The chat in a file of JSON by the template at a path."""
    import orjson

    from fnrecipe.data.chat_template import encode_chat, read_chat_template

    try:
        content = orjson.loads(messages.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UsageError(one_line(f"{messages}: expected a chat as JSON: {error}")) from None
    given = content if isinstance(content, dict) else {"messages": content}
    chat, tools = given.get("messages"), given.get("tools")
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise UsageError(f"{messages}: expected a list of messages, each an object, or an object with messages and tools")
    return encode_chat(read_chat_template(template), chat, tokenizer, tools=tools)


def _family(path: str, pattern: str | None) -> str:
    if pattern is not None or path.endswith(".tiktoken"):
        return "tiktoken"
    is_json = path.endswith(".json") or os.path.exists(os.path.join(path, "tokenizer.json"))
    return "hf" if is_json or not os.path.exists(path) else "sentencepiece"
