"""The law of streams, and what its tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import attrs
import numpy as np

from fnrecipe.data import Cursor, Source, Stream


def plain(value: Any) -> Any:
    """Arrays and attrs values as lists and dicts, which `==` compares."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if attrs.has(type(value)):
        return {field.name: plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def take(source: Source[Any], cursor: Cursor, limit: int) -> list[tuple[Any, Cursor]]:
    """Up to `limit` items and their cursors; the cursors pass through JSON when the stream has moved on."""
    entries = list(islice(source(cursor), limit))
    return [(plain(item), json.loads(json.dumps(after))) for item, after in entries]


def items(source: Source[Any], cursor: Cursor = None) -> list[Any]:
    return [item for item, _ in source(cursor)]


def check_resumes(source: Source[Any], limit: int) -> int:
    """Going on from each of the first `limit` cursors gives the same tail; returns how many there were."""
    whole = take(source, None, limit)
    for k, (_, cursor) in enumerate(whole, 1):
        tail = take(source, cursor, limit - k)
        assert tail == whole[k:], f"going on from item {k} at {cursor!r}"
    return len(whole)


def listed(values: Sequence[Any]) -> Source[Any]:
    """The source of `values`. Cursor: number of the next."""

    def source(cursor: Cursor = None) -> Stream[Any]:
        for number in range(cursor or 0, len(values)):
            yield values[number], number + 1

    return source
