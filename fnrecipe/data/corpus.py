"""Corpora: a source of documents as files, blocks, and a function that reads a block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import attrs
import numpy as np

from fnrecipe.data import compressed
from fnrecipe.data.blocks import Block, Blocks, blocks_of, cut, points
from fnrecipe.data.document import Read
from fnrecipe.data.files import File, fingerprint, lower_name
from fnrecipe.data.formats import jsonl, parquet, text, tokens
from fnrecipe.data.records import MAX_RECORD_BYTES, WHOLE, record_starts
from fnrecipe.data.search import Found, find_files
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError

_log = logging.getLogger(__name__)

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
    """Documents of one source: its files, the blocks they are cut into, and `read(block)`, which gives a block's documents.

    left_out   a line on what the source's path holds beside its files; empty if that is nothing
    """

    name: str
    files: Sequence[File]
    blocks: Blocks
    read: Callable[[Block], Iterator[Read]]
    left_out: str = ""


@attrs.frozen
class Reading:
    """How the documents of a source are told from its bytes.

    text_key   jsonl, parquet: the field or column that holds the text
    separator  text: what stands between documents; None: a file is a document
    dtype      tokens: the type of raw `.bin` files
    max_record_bytes  all but tokens: a longer record is a bad one, and is not kept in memory
    """

    text_key: str = "text"
    separator: str | None = None
    dtype: Literal["uint16", "uint32"] = "uint16"
    max_record_bytes: int = MAX_RECORD_BYTES


def open_corpus(
    path: str,
    tokenizer: Tokenizer,
    *,
    name: str = "",
    format: Format | None = None,
    reading: Reading = Reading(),
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
        format, found = "python", Found(text.python_stdlib())
    else:
        found = find_files(path, SUFFIXES[format] if format else sum(SUFFIXES.values(), ()))
        format = format or _format_of(path, found.files)
        _check(format, found.files)
    blocks = _plan(format, found.files, tokenizer, reading, by_document)
    if not len(blocks):
        raise UsageError(f"{path}: expected at least one document, found only empty files")
    return Corpus(name or path, found.files, blocks, _reader(format, tokenizer, reading), found.left_out)


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


def _format_of(path: str, files: Sequence[File]) -> Format:
    found = {file.path: [name for name, ends in SUFFIXES.items() if lower_name(file.path).endswith(ends)] for file in files}
    unknown = [file for file, names in found.items() if not names]
    if unknown:
        expected = ", ".join(suffix for suffix in sum(SUFFIXES.values(), ()) if not suffix.endswith(compressed.SUFFIXES))
        raise UsageError(f"{unknown[0]}: expected a file called {expected}, or `format` set for this source")
    counts = {name: sum(names == [name] for names in found.values()) for name in SUFFIXES}
    several = [f"{count} {name}" for name, count in counts.items() if count]
    if len(several) > 1:
        raise UsageError(f"{path}: expected files of one format, found {', '.join(several)}; set `format` for this source")
    return next(name for name, count in counts.items() if count)


def _check(format: Format, files: Sequence[File]) -> None:
    """Refuses files that a format cannot be read from."""
    for file in files:
        if format in ("parquet", "tokens") and lower_name(file.path).endswith(compressed.SUFFIXES):
            raise UsageError(f"{file.path}: expected a file of format={format} that is not compressed as a whole; unpack it")
        if format == "jsonl" and file.size:
            jsonl.check(file.path)


def _plan(format: Format, files: Sequence[File], tokenizer: Tokenizer, reading: Reading, by_document: bool) -> Blocks:
    paths = [file.path for file in files]
    if format == "tokens":
        for path in paths:
            tokens.check_dtype(path, reading.dtype, tokenizer.vocab_size)
        if by_document:
            return points(paths, [tokens.starts(path, reading.dtype, tokenizer.eos) for path in paths])
        return cut(paths, tokens.sizes(paths, reading.dtype))
    if format == "python" or (format == "text" and reading.separator is None):
        some = [file for file in files if file.size]
        return blocks_of([Block(file.path, 0, WHOLE) for file in some], [file.size for file in some], single=True)
    closed = [file.path for file in files if lower_name(file.path).endswith((*compressed.SUFFIXES, *parquet.SUFFIXES))]
    if by_document and closed:
        raise UsageError(f"{closed[0]}: order=documents cannot enter this file in the middle; use order=blocks, or unpack it")
    if format == "parquet":
        return parquet.plan(paths)
    separator = (reading.separator or "\n").encode()
    if by_document:
        return points(paths, [record_starts(file.path, file.size, separator) for file in files])
    plain = cut(paths, [0 if file.path in closed else file.size for file in files])
    whole = [number for number, file in enumerate(files) if file.path in closed and file.size]
    table = np.array([(number, 0, WHOLE, 0, 1) for number in whole], np.int64).reshape(-1, 5)
    sizes = np.array([files[number].size for number in whole], np.int64)
    return Blocks(paths, np.concatenate([plain.table, table]), np.concatenate([plain.sizes, sizes]))


def _reader(format: Format, tokenizer: Tokenizer, reading: Reading) -> Callable[[Block], Iterator[Read]]:
    limit = reading.max_record_bytes
    match format:
        case "jsonl":
            return partial(jsonl.read, key=reading.text_key, limit=limit)
        case "parquet":
            return partial(parquet.read, key=reading.text_key, limit=limit)
        case "text":
            return partial(text.read, separator=reading.separator, limit=limit)
        case "python":
            return partial(text.read_python, limit=limit)
        case "tokens":
            return partial(
                tokens.read, dtype=reading.dtype, eos=tokenizer.eos, bos=tokenizer.bos, vocab_size=tokenizer.vocab_size
            )
