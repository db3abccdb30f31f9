"""JSONL: one JSON object a line, its text under one key."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from fnrecipe.data.blocks import Block
from fnrecipe.data.document import Document, Read
from fnrecipe.data.records import Record, read_records
from fnrecipe.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")


def read(block: Block, *, key: str) -> Iterator[Read]:
    """The documents of a block; blank lines are none."""
    for record in read_records(block, b"\n"):
        if isinstance(record, DataError):
            yield record
        elif record.data.strip():
            yield parse(record, key)


def parse(record: Record, key: str) -> Read:
    """The text under `key`, or the error that says why there is none."""
    try:
        value = orjson.loads(record.data)
    except orjson.JSONDecodeError as error:
        text = record.text()
        return text if isinstance(text, DataError) else record.bad(f"expected a JSON object, found {error.msg}")
    if not isinstance(value, dict):
        return record.bad(f"expected a JSON object, found {type(value).__name__}")
    if key not in value:
        return record.bad(f"expected the field {key!r}, found none; {did_you_mean(key, value)}".removesuffix("; "))
    if not isinstance(value[key], str):
        return record.bad(f"expected text in the field {key!r}, found {type(value[key]).__name__}")
    return Document(value[key])
