"""Resumable streams: generators of `(item, cursor)`, where the cursor resumes the stream behind the item.

A **source** is a pure function from a cursor to an iterator: `source(None)` starts, `source(c)` resumes after the item that
came with `c`. A **stage** is a generator function `(source, cursor=None) -> (item, cursor), …`; `pipe` binds stages to
sources. Cursors are small JSON values. The law that every source keeps: if `source(None)` gives `(x1, c1) … (xn, cn)`,
then `source(ck)` gives `(xk+1, ck+1) … (xn, cn)`, for every k and through JSON.

Because the cursor travels with the item, look-ahead (batching, windows, prefetch) needs no state of its own: the
consumer's position is the cursor of the last item that it used, and resuming is a seek.

    def longer(source, cursor=None, *, than):          # a user's own stage
        for text, cursor in source(cursor):
            if len(text) > than:
                yield text, cursor
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from fnrecipe.errors import DataError

_log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

Cursor: TypeAlias = Any
"""A small JSON value, or None at the start. Only the stage that made it knows its structure."""

Stream: TypeAlias = Iterator[tuple[T, Cursor]]
Source: TypeAlias = Callable[[Cursor], Stream[T]]
Stage: TypeAlias = Callable[..., Stream[Any]]
"""`(source, cursor=None, …) -> stream`; Python's types cannot say what a row of them makes of an item."""


def pipe(source: Source[Any], *stages: Stage) -> Source[Any]:
    """The source that feeds `source` through `stages`, left to right."""
    return reduce(lambda upstream, stage: partial(stage, upstream), stages, source)


@contextmanager
def reading(stream: Stream[T]) -> Iterator[Stream[T]]:
    """The stream for as long as the context lasts; what it holds, files and processes, is given back then."""
    try:
        yield stream
    finally:
        if isinstance(stream, Generator):
            stream.close()


def map_items(source: Source[T], cursor: Cursor = None, *, function: Callable[[T], U]) -> Stream[U]:
    """`function` of every item."""
    for item, cursor in source(cursor):
        yield function(item), cursor


def filter_items(source: Source[T], cursor: Cursor = None, *, where: Callable[[T], bool]) -> Stream[T]:
    """The items for which `where` holds."""
    for item, cursor in source(cursor):
        if where(item):
            yield item, cursor


def sift(source: Source[T], cursor: Cursor = None, *, reason: Callable[[T], str], name: str, needed: bool = True) -> Stream[T]:
    """The items for which `reason(item)` to leave them out is empty; if none is left from start to end, a warning says why.

    If not `needed`, there is no warning about a stream without any item, about which a stage before has warned.
    """
    reasons: Counter[str] = Counter()
    is_empty = cursor is None
    for item, cursor in source(cursor):
        why = reason(item)
        if why:
            reasons[why] += 1
        else:
            is_empty = False
            yield item, cursor
    if is_empty and (reasons or needed):
        listed = ", ".join(f"{count:,} {why}" for why, count in reasons.items())
        text = f"{name}: expected documents to use, found none{f' but {listed}' if listed else ''}"
        _log.warning("%s", text, extra={"once": text})


def map_chunks(
    source: Source[T], cursor: Cursor = None, *, size: int, function: Callable[[Sequence[T]], Sequence[U]]
) -> Stream[U]:
    """`function`, from a list to a list of the same length, applied to `size` items at a time."""
    stream = source(cursor)
    while chunk := list(islice(stream, size)):
        items, cursors = zip(*chunk, strict=True)
        yield from zip(function(items), cursors, strict=True)


def map_windows(
    source: Source[T],
    cursor: Cursor = None,
    *,
    window: int | Callable[[int], int],
    function: Callable[[Sequence[T], int], Sequence[U]],
    ends: Callable[[Sequence[T], T], bool] = lambda items, following: False,
) -> Stream[U]:
    """The outputs of `function(items, index)` for one window of items after another: packing, shuffling, splitting.

    `function` must be pure; `window` is a size, or a function of the window's index. A window of fewer items ends where
    `ends(items, following)` says so of it and the item behind it. Cursor: [upstream cursor before the window, the window's
    index, outputs yielded from it]. Resuming inside a window reads that window again.
    """
    before, index, skipped = cursor or (None, 0, 0)
    size = window if callable(window) else lambda index: window
    for items, after in _windows(source(before), size, index, ends):
        outputs = function(items, index)
        for position in range(skipped, len(outputs)):
            last = position + 1 == len(outputs)
            yield outputs[position], ((after, index + 1, 0) if last else (before, index, position + 1))
        before, index, skipped = after, index + 1, 0


def _windows(
    stream: Stream[T], size: Callable[[int], int], index: int, ends: Callable[[Sequence[T], T], bool]
) -> Stream[Sequence[T]]:
    """The items of each window from that of `index` on, with the cursor behind its last one."""
    items: list[T] = []
    after = None
    for item, cursor in stream:
        if items and ends(items, item):
            yield items, after
            items, index = [], index + 1
        items.append(item)
        after = cursor
        if len(items) == size(index):
            yield items, after
            items, index = [], index + 1
    if items:
        yield items, after


def repeat(source: Callable[[int], Source[T]], cursor: Cursor = None, *, epochs: int | None = None) -> Stream[T]:
    """`source(0)`, `source(1)`, …: `epochs` of them, or endlessly; ends early after an epoch without any item.

    Cursor: [epoch, cursor in it].
    """
    epoch, inner = cursor or (0, None)
    while epochs is None or epoch < epochs:
        empty = inner is None
        for item, inner in source(epoch)(inner):
            empty = False
            yield item, (epoch, inner)
        if empty:
            return
        epoch, inner = epoch + 1, None


def endless(source: Source[T], cursor: Cursor = None) -> Stream[T | None]:
    """The items, and behind the last one None without end, each with the cursor behind the last item."""
    for item, cursor in source(cursor):
        yield item, cursor
    while True:
        yield None, cursor


def tolerate(source: Source[T | DataError], cursor: Cursor = None, *, limit: int = 0) -> Stream[T]:
    """The items without bad records: the first `limit` of these are logged as warnings, the next one is raised.

    Cursor: [upstream cursor, bad records so far].
    """
    inner, count = cursor or (None, 0)
    for item, inner in source(inner):
        if not isinstance(item, DataError):
            yield item, (inner, count)
        elif count < limit:
            count += 1
            _log.warning("bad record skipped (%d of at most %d): %s", count, limit, item)
        else:
            raise DataError(f"{item}\n  bad records skipped before it: {limit:,}") if limit else item
