"""Batches of any kind: trees of NumPy arrays, each of which has the rows of the batch along its first dimension.

A tree is an array, or an attrs value, dict, tuple or list of trees. Nothing here knows what an array means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.lanes import LaneAssignment
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import UsageError

B = TypeVar("B")


def arrays(batch: object, path: str = "batch") -> Iterator[tuple[str, NDArray[np.generic]]]:
    """The arrays of a batch by their dotted paths.

    Raises:
        UsageError: for what is neither an array nor made of trees.
    """
    children = _children(batch)
    if isinstance(batch, np.ndarray):
        yield path, batch
    elif children is None:
        raise UsageError(f"{path}: expected a NumPy array, or an attrs value, dict, tuple or list, found {_kind(batch)}")
    else:
        for name, child in children.items():
            yield from arrays(child, f"{path}.{name}")


def num_rows(batch: object) -> int:
    """The number of rows.

    Raises:
        UsageError: if arrays disagree in it, or there is none.
    """
    found = list(arrays(batch))
    flat = [path for path, array in found if not array.ndim]
    if flat or not found:
        raise UsageError(f"{flat[0] if flat else 'batch'}: expected rows along the first dimension, found none")
    (first, rows), *others = ((path, len(array)) for path, array in found)
    for path, size in others:
        if size != rows:
            raise UsageError(f"{path}: expected as many rows as {first}, {rows}, found {size}")
    return rows


def join(parts: Sequence[B]) -> B:
    """The rows of several batches of one structure, one after the other."""
    return cast("B", _join(parts))


def checked(
    make: Callable[[LaneAssignment], Source[B]], assignment: LaneAssignment, *, name: str, batch_size: int
) -> Source[B]:
    """The source of this process's batches, whose items are looked at: see `check_batches`."""
    return partial(check_batches, make(assignment), name=name, rows=assignment.rows(batch_size))


def check_batches(source: Source[B], cursor: Cursor = None, *, name: str, rows: int) -> Stream[B]:
    """The same items of a source of batches.

    Raises:
        UsageError: beginning with `name`, if an item is no batch of `rows` rows with a cursor that JSON keeps.
    """
    if not callable(source):
        raise UsageError(f"{name}: expected a source, a function of a cursor, found {_kind(source)}")
    stream = source(cursor)
    if not isinstance(stream, Iterator):
        raise UsageError(f"{name}: expected an iterator of (batch, cursor) from the source, found {_kind(stream)}")
    for number, entry in enumerate(stream):
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise UsageError(f"{name}: expected (batch, cursor) for each item, found {_kind(entry)}")
        _check_rows(entry[0], name, rows)
        if number == 0:
            _check_cursor(entry[1], name)
        yield entry


def _join(parts: Sequence[object]) -> object:
    first, children = parts[0], [_children(part) for part in parts]
    if children[0] is None:
        return np.concatenate([np.asarray(part) for part in parts])
    joined = {name: _join([(trees or {})[name] for trees in children]) for name in children[0]}
    if isinstance(first, dict):
        return joined
    if isinstance(first, list | tuple) and not hasattr(first, "_fields"):
        return type(first)(joined.values())
    return type(first)(*joined.values())


def _check_rows(batch: object, name: str, rows: int) -> None:
    try:
        found = num_rows(batch)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    if found != rows:
        raise UsageError(f"{name}: expected batches of {rows} rows, this process's part of dataset.batch_size, found {found}")


def _check_cursor(cursor: Cursor, name: str) -> None:
    try:
        json.dumps(cursor)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: expected (batch, cursor) with a cursor that JSON can keep, found: {error}") from None


def _children(value: object) -> Mapping[str, object] | None:
    """The trees that a tree is made of by name, in the order of its constructor; None for anything else."""
    cls: type[object] = type(value)
    if attrs.has(cls):
        return {field.name: getattr(value, field.name) for field in attrs.fields(cls)}
    if isinstance(value, dict):
        return value
    return {str(number): child for number, child in enumerate(value)} if isinstance(value, list | tuple) else None


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
