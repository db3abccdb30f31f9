"""Prefetch: a stage that reads ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TypeAlias

from fnrecipe.data.stream import Cursor, Source, Stream, T
from fnrecipe.errors import FnrecipeError

Entry: TypeAlias = tuple[tuple[T, Cursor] | None, BaseException | None]
"""An item with its cursor, or None at the end of the stream; or the error that took its place."""

_NAME = "prefetch"

_LOOK = 1.0
"""Seconds after which a waiting consumer checks that the thread is still alive."""

_PATIENCE = 0.5
"""Seconds for which closing a stream waits for the thread, which may be stuck in a read."""


def prefetch(source: Source[T], cursor: Cursor = None, *, size: int) -> Stream[T]:
    """The same stream, up to `size` items ahead of its consumer; 0 reads ahead nothing.

    An error of the source is raised where its item would have been. Closing the stream ends the thread, after its current
    item.

    Raises:
        FnrecipeError: if the thread cannot be started, or dies before the stream ends.
    """
    # Read-ahead needs no state of its own: each item carries its cursor, so the position of the consumer is that of the last
    # item that it used, whatever is in the queue. Neither side may block on the other for good: the thread gives up a full
    # queue once the stream is closed, the consumer an empty one once the thread is dead (out of memory, say, without a word).
    if size == 0:
        yield from source(cursor)
        return
    ready: queue.Queue[Entry[T]] = queue.Queue(size)
    closed = threading.Event()
    thread = threading.Thread(target=_read, args=(source, cursor, ready, closed), name=_NAME, daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:
        raise FnrecipeError(f"dataset.prefetch: {problem}; 0 reads ahead nothing and needs none") from problem
    try:
        while True:
            entry, error = _take(ready, thread)
            if error is not None:
                raise error
            if entry is None:
                return
            yield entry
    finally:
        closed.set()
        thread.join(_PATIENCE)


def left_behind() -> bool:
    """Whether the thread of a closed stream is still alive, stuck in a read."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def _take(ready: queue.Queue[Entry[T]], thread: threading.Thread) -> Entry[T]:
    while True:
        alive = thread.is_alive()  # asked first: whatever a dead thread has put is in the queue by now
        try:
            return ready.get(timeout=_LOOK if alive else 0)
        except queue.Empty:
            if not alive:
                raise FnrecipeError(
                    "the thread that reads the data ahead ended before its stream did; out of memory?"
                ) from None


def _read(source: Source[T], cursor: Cursor, ready: queue.Queue[Entry[T]], closed: threading.Event) -> None:
    stream: Stream[T] = iter(())
    try:
        stream = source(cursor)
        for entry in stream:
            if not _put(ready, (entry, None), closed):
                return
        _put(ready, (None, None), closed)
    except BaseException as error:  # of whatever class: it is the consumer's
        _put(ready, (None, error), closed)
    finally:
        if isinstance(stream, Generator):
            stream.close()


def _put(ready: queue.Queue[Entry[T]], entry: Entry[T], closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            ready.put(entry, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False
