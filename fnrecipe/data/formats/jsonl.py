"""JSONL: one JSON object a line, its text under one key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import orjson

from fnrecipe.data.blocks import Block, Blocks
from fnrecipe.data.document import Document, Read
from fnrecipe.data.files import File, lower_name, opened
from fnrecipe.data.formats.format import Format, Reading, blocks_of_records, with_compressed
from fnrecipe.data.records import MAX_RECORD_BYTES, Record, read_records
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import DataError, UsageError, did_you_mean

_DOUBTFUL = with_compressed(".json")
_HEAD = 1 << 16


def check(path: str) -> None:
    """Refuses a file called `.json` that holds one array, or one object over several lines.

    Raises:
        UsageError: saying how to make lines of it.
        DataError: if it cannot be read.
    """
    first = first_line(path) if lower_name(path).endswith(_DOUBTFUL) else b""
    if first.startswith(b"["):
        found, way = "one array", ".[]"
    elif first == b"{":
        found, way = "one object over several lines", "."
    else:
        return
    raise UsageError(f"{path}: expected a JSON object on each line, found {found}; convert it: jq -c '{way}' FILE > FILE.jsonl")


def is_array(path: str) -> bool:
    """Whether a file called `.json` holds one array."""
    return lower_name(path).endswith(_DOUBTFUL) and first_line(path).startswith(b"[")


def first_line(path: str) -> bytes:
    """The beginning of the first line that is not blank, without white space around it."""
    with opened(path) as file:
        return file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].rstrip()


def read(block: Block, *, key: str, limit: int = MAX_RECORD_BYTES) -> Iterator[Read]:
    """The documents of a block; blank lines are none."""
    for record in read_records(block, b"\n", limit):
        if isinstance(record, DataError):
            yield record
        elif record.data.strip():
            yield parse(record, key)


def parse(record: Record, key: str) -> Read:
    """The text under `key`, or the error that says why there is none."""
    trouble = ""
    try:
        value = orjson.loads(record.data)
    except orjson.JSONDecodeError as error:
        value, trouble = _with_trouble_elsewhere(record.data, key), error.msg
    if trouble and value is None:
        text = record.text()
        return text if isinstance(text, DataError) else record.bad(f"expected a JSON object, found {trouble}")
    if not isinstance(value, dict):
        return record.bad(f"expected a JSON object, found {type(value).__name__}")
    if key not in value:
        return record.bad(f"expected the field {key!r}, found none; {did_you_mean(key, value)}".removesuffix("; "))
    if not isinstance(value[key], str):
        return record.bad(f"expected text in the field {key!r}, found {type(value[key]).__name__}")
    return Document(value[key], place=record.place)


def _with_trouble_elsewhere(data: bytes, key: str) -> dict[str, object] | None:
    """The object in a line that orjson refuses, if only fields that are not read are to blame: None if not.

    Python's own parser takes NaN and infinities, halves of surrogate pairs, raw control characters and bytes that are no UTF-8.
    """
    try:
        value = json.loads(data.decode(errors="surrogateescape"), strict=False, parse_int=lambda _: 0)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    text = value.get(key)
    return None if isinstance(text, str) and _is_to_blame(text, data) else value


def _is_to_blame(text: str, data: bytes) -> bool:
    """Whether text has half a surrogate pair, which also stands for a byte that is no UTF-8, or a raw control character."""
    control = {chr(byte) for byte in set(data.strip()) if byte < 32}
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return not control.isdisjoint(text)


def _plan(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    for file in files:
        if file.size:
            check(file.path)
    return blocks_of_records(files, b"\n", by_document)


def _read(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    return read(block, key=reading.text_key, limit=reading.max_record_bytes)


JSONL = Format(with_compressed(".jsonl", ".ndjson", ".json"), _plan, _read)
