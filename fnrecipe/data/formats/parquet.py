"""Parquet: one document a row, its text in one column; a block is a row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import opened
from fnrecipe.errors import DataError, UsageError, did_you_mean

SUFFIXES = (".parquet",)
_ROWS = 1024


def plan(paths: Sequence[str]) -> Blocks:
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


def read(block: Block, *, key: str) -> Iterator[Read]:
    """The documents of a block's row group.

    Raises:
        UsageError: if there is no such column.
    """
    with _parquet(block.path) as file:
        if key not in file.schema_arrow.names:
            hint = did_you_mean(key, file.schema_arrow.names)
            raise UsageError(f"{block.path}: expected the column {key!r}, found none; {hint}".removesuffix("; "))
        for row, value in islice(_values(file, block.start, key), block.stripe, None, block.stripes):
            if isinstance(value, str):
                yield Document(value)
            else:
                found = type(value).__name__ if value is not None else "null"
                where = f"row {row:,} of row group {block.start}"
                yield DataError(f"{block.path}: {where}: expected text in the column {key!r}, found {found}")


def _values(file: Any, group: int, key: str) -> Iterator[tuple[int, Any]]:
    row = 0
    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[key]):
        for value in batch.column(0).to_pylist():
            yield row, value
            row += 1


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: pip install 'fnrecipe[parquet]'") from None
    with opened(path) as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw) as file:
                yield file
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from None
