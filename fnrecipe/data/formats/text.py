"""Plain text: one document a file, or documents between separators; and Python sources, in the encoding they declare."""

from __future__ import annotations

import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import File, opened
from fnrecipe.data.formats.format import Format, Reading, blocks_of_files, blocks_of_records, with_compressed
from fnrecipe.data.records import MAX_RECORD_BYTES, Record, read_records, read_whole, separator_end, too_long
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError

_TESTS = {"test", "tests", "idle_test"}


def read(block: Block, *, separator: str | None, limit: int = MAX_RECORD_BYTES) -> Iterator[Read]:
    """The documents of a block, without their separators; what is white space alone is none."""
    for record in read_whole(block.path, limit) if separator is None else read_records(block, separator.encode(), limit):
        if isinstance(record, DataError):
            yield record
            continue
        text = record.text()
        if isinstance(text, DataError):
            yield text
        elif (content := text[: separator_end(text, separator)] if separator else text) and not content.isspace():
            yield Document(content, place=record.place)


def read_python(block: Block, *, limit: int = MAX_RECORD_BYTES) -> Iterator[Read]:
    """A Python source file as one document."""
    with opened(block.path) as file:
        source = file.read(limit + 1)
    if len(source) > limit:
        yield too_long(Record(block.path, 0, source), limit)
        return
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        yield Document(io.TextIOWrapper(io.BytesIO(source), encoding).read(), place=partial(str, block.path))
    except (UnicodeError, LookupError, SyntaxError) as error:
        yield DataError(f"{block.path}: expected text in the encoding that it declares: {error}")


def python_stdlib() -> list[File]:
    """The source files of this Python's standard library without its tests, ordered by their names in it.

    Raises:
        UsageError: if this Python came without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).parts for path in root.rglob("*.py"))
    library = [parts for parts in names if parts[0].removesuffix(".py") in sys.stdlib_module_names and not _TESTS & set(parts)]
    if not library:
        raise UsageError(f"{root}: expected the sources of Python's standard library, found none; set dataset.sources")
    paths = [root.joinpath(*parts) for parts in library]
    return [File(str(path), str(path.relative_to(root)), path.stat().st_size) for path in paths]


def _plan(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    if reading.separator is None:
        return blocks_of_files(files)
    return blocks_of_records(files, reading.separator.encode(), by_document)


def _plan_python(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    return blocks_of_files(files)


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read(block, separator=reading.separator, limit=reading.max_record_bytes)


def _read_python(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read_python(block, limit=reading.max_record_bytes)


TEXT = Format(with_compressed(".txt"), _plan, _read)
PYTHON = Format((".py",), _plan_python, _read_python)
