"""What a format is, and how most of them cut files into blocks: by records between separators, or a block a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import attrs
import numpy as np

from fnrecipe.data import compressed
from fnrecipe.data.blocks import Block, Blocks, blocks_of, cut, points
from fnrecipe.data.document import Read
from fnrecipe.data.files import File, lower_name
from fnrecipe.data.records import MAX_RECORD_BYTES, WHOLE, record_starts
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import UsageError


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


Plan: TypeAlias = Callable[[Sequence[File], Reading, Tokenizer, bool], Blocks]
ReadBlock: TypeAlias = Callable[[Block, Reading, Tokenizer], Iterator[Read]]


@attrs.frozen
class Format:
    """How files of one kind become documents.

    suffixes  that its files have, in lower case; `x.gz` and its like too if it reads compressed files
    plan      (files, reading, tokenizer, by_document) -> the blocks that the files are cut into, each a document if
              `by_document`; it refuses files that cannot be read so
    read      (block, reading, tokenizer) -> the documents that start in a block, in order; a bad record is a DataError
              among them. It gives the same each time: going on inside a block reads the block again
    """

    suffixes: tuple[str, ...]
    plan: Plan
    read: ReadBlock


def with_compressed(*suffixes: str) -> tuple[str, ...]:
    """The suffixes, each followed by itself with every suffix of a compressed file."""
    return tuple(suffix + packed for suffix in suffixes for packed in ("", *compressed.SUFFIXES))


def blocks_of_files(files: Sequence[File]) -> Blocks:
    """A block for each file that is not empty, and that is one document."""
    some = [file for file in files if file.size]
    return blocks_of([Block(file.path, 0, WHOLE) for file in some], [file.size for file in some], single=True)


def blocks_of_records(
    files: Sequence[File], separator: bytes, by_document: bool, is_one: Callable[[str], bool] = lambda path: False
) -> Blocks:
    """Blocks of bytes, whose records end with `separator` (`records.read_records`).

    A compressed file is one block, from 0 to `WHOLE`, and so is each file for which `is_one(path)` holds.

    Raises:
        UsageError: if each document is to be a block, and a file is one block.
    """
    paths = [file.path for file in files]
    closed = [_is_compressed(file.path) or (file.size > 0 and is_one(file.path)) for file in files]
    if by_document:
        check_can_be_entered([path for path, shut in zip(paths, closed, strict=True) if shut])
        return points(paths, [record_starts(file.path, file.size, separator) for file in files])
    plain = cut(paths, [0 if shut else file.size for file, shut in zip(files, closed, strict=True)])
    whole = [number for number, file in enumerate(files) if closed[number] and file.size]
    table = np.array([(number, 0, WHOLE, 0, 1) for number in whole], np.int64).reshape(-1, 5)
    sizes = np.array([files[number].size for number in whole], np.int64)
    return Blocks(paths, np.concatenate([plain.table, table]), np.concatenate([plain.sizes, sizes]))


def check_can_be_entered(closed: Sequence[str]) -> None:
    """Refuses the first of some files that are read from their start, or by large pieces, where each document is a block."""
    if closed:
        raise UsageError(f"{closed[0]}: order=documents cannot enter this file in the middle; use order=blocks, or unpack it")


def check_not_compressed(files: Sequence[File], name: str) -> None:
    """Refuses compressed files for the format called `name`, which is compressed inside, or mapped into memory."""
    for file in files:
        if _is_compressed(file.path):
            raise UsageError(f"{file.path}: expected a file of format={name} that is not compressed as a whole; unpack it")


def _is_compressed(path: str) -> bool:
    return lower_name(path).endswith(compressed.SUFFIXES)
