"""Parquet: one document a row, its text in one column; a block is a row group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import orjson

from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import File, opened
from fnrecipe.data.formats.format import Format, Reading, check_can_be_entered, check_not_compressed
from fnrecipe.data.records import MAX_RECORD_BYTES
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError, did_you_mean, few, one_line

_ROWS = 1024
_HEADERS = 1 << 16
_PLAIN = frozenset(("PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"))


def row_groups(paths: Sequence[str]) -> Blocks:
    """A block for each row group that has rows.

    Raises:
        DataError: if a file is not Parquet.
    """
    rows: list[tuple[int, ...]] = []
    sizes: list[int] = []
    for number, path in enumerate(paths):
        with _parquet(path) as file:
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        found = {g: group.total_byte_size for g, group in enumerate(groups) if group.num_rows}
        rows += [(number, group, group + 1, 0, 1) for group in found]
        sizes += found.values()
    return Blocks(paths, np.array(rows, np.int64).reshape(-1, 5), np.array(sizes, np.int64))


def read(block: Block, *, key: str, limit: int = MAX_RECORD_BYTES) -> Iterator[Read]:
    """The documents of a block's row group.

    Raises:
        UsageError: if there is no such column.
    """
    with _parquet(block.path, key, block.start) as file:
        if key not in file.schema_arrow.names:
            hint = did_you_mean(key, file.schema_arrow.names)
            raise UsageError(f"{block.path}: expected the column {key!r}, found none; {hint}".removesuffix("; "))
        where = f"row group {block.start}"
        size, rows = _cost(file.metadata, block.start, key, limit)
        if not rows:
            found = f"{where}: expected rows of at most {limit:,} bytes (dataset.max_record_bytes), found {size:,} bytes in all"
            yield from [DataError(f"{block.path}: {found}")] * (block.stripe == 0)
            return
        for row, value in islice(_values(file, block.start, key, rows), block.stripe, None, block.stripes):
            wrong = _wrong(value, key, limit)
            place = f"{block.path}: row {row:,} of {where}"
            yield DataError(f"{place}: {wrong}") if wrong else Document(value, place=partial(str, place))


def _cost(metadata: Any, group: int, key: str, limit: int) -> tuple[int, int]:
    """The bytes of a row group's column, before a page is decompressed, and how many rows to decode at once, 0 for none.

    A page is decompressed whole: that takes at most the column's bytes, or the 2 GiB that Parquet allows for a page.
    """
    column, num_rows = _column(metadata, group, key), metadata.row_group(group).num_rows
    size = column.total_uncompressed_size if column else 0
    if size > limit * num_rows + _HEADERS:
        return size, 0
    if column and not _PLAIN.issuperset(column.encodings):  # beginnings that values share are there once
        return size, min(max(limit // max(size, 1), 1), _ROWS)
    return size, min(max(limit * num_rows // max(size, 1), 1), _ROWS)


def _column(metadata: Any, group: int, key: str) -> Any:
    """The metadata of a row group's column, None if it is nested or not there."""
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    return metadata.row_group(group).column(names.index(key)) if key in names else None


def _values(file: Any, group: int, key: str, rows: int) -> Iterator[tuple[int, Any]]:
    """(row, value) of a column; in the place of text that is no UTF-8 the error that says so."""
    row = 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=[key]):
        column = batch.column(0)
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = map(_value, column)
        for value in values:
            yield row, value
            row += 1


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _wrong(value: object, key: str, limit: int) -> str:
    """What is wrong with a row's value; nothing with text."""
    if isinstance(value, UnicodeDecodeError):
        return f"expected UTF-8 in the column {key!r}, found byte {value.object[value.start]:#04x} at byte {value.start}"
    if not isinstance(value, str):
        return f"expected text in the column {key!r}, found {type(value).__name__ if value is not None else 'null'}"
    if len(value) > limit // 4 and len(value.encode()) > limit:
        return _longer(limit)
    return ""


def _longer(limit: int) -> str:
    return f"expected a record of at most {limit:,} bytes (dataset.max_record_bytes), found more"


def read_rows(block: Block, *, keys: Collection[str], limit: int = MAX_RECORD_BYTES) -> Iterator[Read]:
    """The rows of a block's row group, as JSON objects of the columns that are among `keys`.

    Raises:
        UsageError: if there is none.
    """
    with _parquet(block.path) as file:
        columns = [name for name in file.schema_arrow.names if name in keys]
        if not columns:
            expected = f"expected one of the columns {few(sorted(keys), len(keys))}"
            raise UsageError(f"{block.path}: {expected}, found {few(file.schema_arrow.names)}")
        where, group = f"row group {block.start}", file.metadata.row_group(block.start)
        size, rows = group.total_byte_size, group.num_rows
        if size > limit * rows + _HEADERS:
            found = f"{where}: expected rows of at most {limit:,} bytes (dataset.max_record_bytes), found {size:,} bytes in all"
            yield from [DataError(f"{block.path}: {found}")] * (block.stripe == 0)
            return
        at_once = min(max(limit * rows // max(size, 1), 1), _ROWS)
        batches = file.iter_batches(at_once, row_groups=[block.start], columns=columns)
        items = (row for batch in batches for row in batch.to_pylist())
        for number, row in islice(enumerate(items), block.stripe, None, block.stripes):
            yield _row(row, f"{block.path}: row {number:,} of {where}", limit)


def _row(row: Mapping[str, object], place: str, limit: int) -> Read:
    bad = partial(_bad_row, place)
    try:
        data = orjson.dumps(row)
    except TypeError as error:
        return bad(f"expected values of JSON: {error}")
    return bad(_longer(limit)) if len(data) > limit else Document(data.decode(), bad=bad, place=partial(str, place))


def _bad_row(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what}")


@contextmanager
def _parquet(path: str, key: str = "", group: int = 0) -> Iterator[Any]:
    """An open file; the column `key` of a row group comes as a dictionary, if it is one: each text is in memory once."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: pip install 'fnrecipe[parquet]'") from None
    with opened(path) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw)
            column = _column(file.metadata, group, key) if key else None
            if column and column.has_dictionary_page and _PLAIN.issuperset(column.encodings):
                file = pyarrow.parquet.ParquetFile(raw, metadata=file.metadata, read_dictionary=[key])
            yield file
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: cannot be read as Parquet: {one_line(str(error))}") from None


def _plan(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    check_not_compressed(files, "parquet")
    paths = [file.path for file in files]
    check_can_be_entered(paths if by_document else [])
    return row_groups(paths)


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read(block, key=reading.text_key, limit=reading.max_record_bytes)


PARQUET = Format((".parquet",), _plan, _read)
