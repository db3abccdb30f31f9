"""Corpora: a source of documents as files, blocks, and a function that reads a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import attrs
import numpy as np

from fnrecipe.data.blocks import Block, Blocks, blocks_of, cut, points, stripe
from fnrecipe.data.document import Read
from fnrecipe.data.files import COMPRESSIONS, File, find_files, fingerprint
from fnrecipe.data.formats import jsonl, parquet, text, tokens
from fnrecipe.data.records import WHOLE, record_starts
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError

Format: TypeAlias = Literal["jsonl", "parquet", "text", "python", "tokens"]
STDLIB = "stdlib:"
SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    "jsonl": jsonl.SUFFIXES,
    "parquet": parquet.SUFFIXES,
    "text": text.SUFFIXES,
    "python": text.PYTHON_SUFFIXES,
    "tokens": tokens.SUFFIXES,
}


@attrs.frozen(eq=False)
class Corpus:
    """Documents of one source: its files, the blocks they are cut into, and `read(block)`, which gives a block's documents."""

    name: str
    files: Sequence[File]
    blocks: Blocks
    read: Callable[[Block], Iterator[Read]]


@attrs.frozen
class Reading:
    """How the documents of a source are told from its bytes.

    text_key   jsonl, parquet: the field or column that holds the text
    separator  text: what stands between documents; None: a file is a document
    dtype      tokens: the type of raw `.bin` files
    """

    text_key: str = "text"
    separator: str | None = None
    dtype: Literal["uint16", "uint32"] = "uint16"


def open_corpus(
    path: str,
    tokenizer: Tokenizer,
    *,
    name: str = "",
    format: Format | None = None,
    reading: Reading = Reading(),
    num_lanes: int = 1,
    by_document: bool = False,
) -> Corpus:
    """The documents of a file, a directory, a glob, an address of fsspec, or `stdlib:`, the sources of Python's library.

    Without `format`, the files' suffixes say it. With `by_document`, every document is a block of its own: that takes one
    pass over text, and lets documents be put in any order.

    Raises:
        UsageError: if there are no files, or none that are not empty, or of several formats.
        DataError: if one cannot be read.
    """
    if path == STDLIB:
        format, files = "python", text.python_stdlib()
    else:
        files = find_files(path, SUFFIXES[format] if format else sum(SUFFIXES.values(), ()))
        format = format or _format_of(path, files)
    blocks = _plan(format, files, tokenizer, reading, num_lanes, by_document)
    if not len(blocks):
        raise UsageError(f"{path}: expected at least one document, found only empty files")
    return Corpus(name or path, files, blocks, _reader(format, tokenizer, reading))


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


def fingerprints(corpora: Sequence[Corpus]) -> dict[str, str]:
    """`fingerprint` of every file, by its corpus and name."""
    return {f"{corpus.name}: {file.name}": fingerprint(file) for corpus in corpora for file in corpus.files}


def _format_of(path: str, files: Sequence[File]) -> Format:
    found = {file.path: [name for name, ends in SUFFIXES.items() if file.path.endswith(ends)] for file in files}
    unknown = [file for file, names in found.items() if not names]
    if unknown:
        expected = ", ".join(sum(SUFFIXES.values(), ()))
        raise UsageError(f"{unknown[0]}: expected a file called {expected}, or `format` set for this source")
    counts = {name: sum(names == [name] for names in found.values()) for name in SUFFIXES}
    several = [f"{count} {name}" for name, count in counts.items() if count]
    if len(several) > 1:
        raise UsageError(f"{path}: expected files of one format, found {', '.join(several)}; set `format` for this source")
    return next(name for name, count in counts.items() if count)


def _plan(
    format: Format, files: Sequence[File], tokenizer: Tokenizer, reading: Reading, num_lanes: int, by_document: bool
) -> Blocks:
    paths = [file.path for file in files]
    if format == "tokens":
        for path in paths:
            tokens.check_dtype(path, reading.dtype, tokenizer.vocab_size)
        if by_document:
            return points(paths, [tokens.starts(path, reading.dtype, tokenizer.eos) for path in paths])
        return cut(paths, tokens.sizes(paths, reading.dtype), num_lanes)
    if format == "python" or (format == "text" and reading.separator is None):
        return blocks_of(Block(file.path, 0, WHOLE) for file in files if file.size)
    closed = [file.path for file in files if file.path.endswith((*COMPRESSIONS, *parquet.SUFFIXES))]
    if by_document and closed:
        raise UsageError(f"{closed[0]}: order=documents cannot enter this file in the middle; use order=blocks, or unpack it")
    if format == "parquet":
        blocks = parquet.plan(paths)
        return stripe(blocks, num_lanes) if 0 < len(blocks) < num_lanes else blocks
    separator = (reading.separator or "\n").encode()
    if by_document:
        return points(paths, [record_starts(file.path, file.size, separator) for file in files])
    plain = cut(paths, [0 if file.path in closed else file.size for file in files], num_lanes)
    whole = [(number, 0, WHOLE, 0, 1) for number, file in enumerate(files) if file.path in closed and file.size]
    blocks = Blocks(paths, np.concatenate([plain.table, np.array(whole, np.int64).reshape(-1, 5)]))
    return stripe(blocks, num_lanes) if 0 < len(blocks) < num_lanes else blocks


def _reader(format: Format, tokenizer: Tokenizer, reading: Reading) -> Callable[[Block], Iterator[Read]]:
    match format:
        case "jsonl":
            return partial(jsonl.read, key=reading.text_key)
        case "parquet":
            return partial(parquet.read, key=reading.text_key)
        case "text":
            return partial(text.read, separator=reading.separator)
        case "python":
            return text.read_python
        case "tokens":
            return partial(
                tokens.read, dtype=reading.dtype, eos=tokenizer.eos, bos=tokenizer.bos, vocab_size=tokenizer.vocab_size
            )
