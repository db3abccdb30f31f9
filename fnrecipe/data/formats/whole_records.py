"""Formats whose documents are whole records as JSON objects, for recipes that read several fields: lines, arrays, Parquet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import attrs
import orjson

from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import File, opened
from fnrecipe.data.formats import jsonl, parquet
from fnrecipe.data.formats.format import Format, Reading, blocks_of_records
from fnrecipe.data.records import WHOLE, Record, read_records
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError

MAX_ARRAY_BYTES = 1 << 30
_EXCERPT = 80


def whole_records(keys: Collection[str]) -> Mapping[str, Format]:
    """JSON lines, a JSON array in a file called `.json`, and Parquet, of which the columns among `keys` are read."""
    read_rows = partial(_read_rows, keys=keys)
    return {
        "jsonl": Format(jsonl.JSONL.suffixes, _plan, _read),
        "parquet": Format(parquet.PARQUET.suffixes, parquet.PARQUET.plan, read_rows),
    }


def read_array(block: Block, limit: int) -> Iterator[Read]:
    """The items of the array that a file is; the file is parsed as a whole.

    Raises:
        DataError: if it is too large for that, or no JSON.
    """
    with opened(block.path) as file:
        data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        way = "make lines of it: jq -c '.[]' FILE > FILE.jsonl"
        raise DataError(f"{block.path}: expected a JSON array of at most {MAX_ARRAY_BYTES:,} bytes, found more; {way}")
    try:
        items = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{block.path}:{error.lineno}: expected a JSON array, found {error.msg}") from None
    for number, item in islice(enumerate(items, 1), block.stripe, None, block.stripes):
        text, place = orjson.dumps(item), f"{block.path}: item {number:,} of its array"
        bad = partial(_bad_item, place)
        longer = f"expected a record of at most {limit:,} bytes (dataset.max_record_bytes), found more"
        yield bad(longer) if len(text) > limit else Document(text.decode(), bad=bad, place=partial(str, place))


def read_lines(block: Block, limit: int) -> Iterator[Read]:
    """The lines of a block, unparsed; blank ones are none."""
    for record in read_records(block, b"\n", limit):
        if isinstance(record, DataError):
            yield record
        elif record.data.strip():
            yield _document(record)


def _document(record: Record) -> Read:
    text = record.text()
    beginning = attrs.evolve(record, data=record.data[:_EXCERPT])
    return text if isinstance(text, DataError) else Document(text, bad=beginning.bad, place=record.place)


def _bad_item(place: str, what: str) -> DataError:
    return DataError(f"{place}: {what}")


def _plan(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    arrays = {file.path for file in files if file.size and jsonl.is_array(file.path)}
    for file in files:
        if file.size and file.path not in arrays:
            jsonl.check(file.path)
    return blocks_of_records(files, b"\n", by_document, arrays.__contains__)


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    is_array = block.stop == WHOLE and jsonl.is_array(block.path)
    return (read_array if is_array else read_lines)(block, reading.max_record_bytes)


def _read_rows(block: Block, reading: Reading, tokenizer: Tokenizer, *, keys: Collection[str]) -> Iterator[Read]:
    return parquet.read_rows(block, keys=keys, limit=reading.max_record_bytes)
