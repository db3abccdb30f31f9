"""Corpora: a source of documents as files, blocks, and a function that reads a block."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from fnrecipe.data import compressed
from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Read
from fnrecipe.data.files import File, fingerprint, lower_name
from fnrecipe.data.formats import FORMATS, Format, Reading
from fnrecipe.data.formats.text import PYTHON, python_stdlib
from fnrecipe.data.search import Found, find_files
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError, did_you_mean, redacted

_log = logging.getLogger(__name__)

STDLIB = "stdlib:"


@attrs.frozen(eq=False)
class Corpus:
    """Documents of one source: its files, the blocks they are cut into, and `read(block)`, which gives a block's documents.

    left_out   a line on what the source's path holds beside its files; empty if that is nothing
    """

    name: str
    files: Sequence[File]
    blocks: Blocks
    read: Callable[[Block], Iterator[Read]]
    left_out: str = ""


def open_corpus(
    path: str,
    tokenizer: Tokenizer,
    *,
    name: str = "",
    format: str | None = None,
    reading: Reading = Reading(),
    by_document: bool = False,
    formats: Mapping[str, Format] = FORMATS,
) -> Corpus:
    """The documents of a file, a directory, a glob, an address of fsspec, or `stdlib:`, the sources of Python's library.

    `format` is one of the names of `formats`; without it, the files' suffixes say it. With `by_document`, every document is a
    block of its own: that takes one pass over text, and lets documents be put in any order.

    Raises:
        UsageError: if there is no such format, no file, or none that is not empty; if files are of several formats.
        DataError: if one cannot be read.
    """
    if path == STDLIB:
        form, found = formats.get("python", PYTHON), Found(python_stdlib())
    else:
        candidates = formats if format is None else {format: _called(format, formats)}
        found = find_files(path, _suffixes(candidates))
        form = candidates[format or _format_of(path, found.files, formats)]
    blocks = form.plan(found.files, reading, tokenizer, by_document)
    if not len(blocks):
        raise UsageError(f"{path}: expected at least one document, found only empty files")
    return Corpus(
        name or redacted(path), found.files, blocks, lambda block: form.read(block, reading, tokenizer), found.left_out
    )


def texts_of(corpus: Corpus) -> Iterator[str]:
    """The text of every document, block by block.

    Raises:
        DataError: at a bad record.
        UsageError: at a document that has no text, but token ids.
    """
    for block in corpus.blocks:
        for item in corpus.read(block):
            if isinstance(item, DataError):
                raise item
            if item.text is None:
                raise UsageError(f"{block.path}: expected text, found token ids")
            if item.text:
                yield item.text


def tell_left_out(corpora: Sequence[Corpus]) -> None:
    """Warns of what the sources' paths hold beside their files: in one process, of all that open the sources."""
    for line in dict.fromkeys(corpus.left_out for corpus in corpora if corpus.left_out):
        _log.warning("%s", line)


def fingerprints(corpora: Sequence[Corpus]) -> dict[str, str]:
    """`fingerprint` of every file, by its corpus and name."""
    return {f"{corpus.name}: {file.name}": fingerprint(file) for corpus in corpora for file in corpus.files}


def _called(name: str, formats: Mapping[str, Format]) -> Format:
    if name not in formats:
        raise UsageError(f"format: expected the name of a format, found {name!r}; {did_you_mean(name, formats)}")
    return formats[name]


def _suffixes(formats: Mapping[str, Format]) -> list[str]:
    return [suffix for form in formats.values() for suffix in form.suffixes]


def _format_of(path: str, files: Sequence[File], formats: Mapping[str, Format]) -> str:
    """The name of the one format that all files have the suffixes of."""
    names = {
        file.path: [name for name, form in formats.items() if lower_name(file.path).endswith(form.suffixes)] for file in files
    }
    unknown = [file for file, found in names.items() if not found]
    if unknown:
        expected = ", ".join(suffix for suffix in _suffixes(formats) if not suffix.endswith(compressed.SUFFIXES))
        raise UsageError(f"{unknown[0]}: expected a file called {expected}, or `format` set for this source")
    counts = Counter(name for found in names.values() for name in found)
    if len(counts) > 1:
        several = ", ".join(f"{counts[name]} {name}" for name in formats if counts[name])
        raise UsageError(f"{path}: expected files of one format, found {several}; set `format` for this source")
    return next(iter(counts))
