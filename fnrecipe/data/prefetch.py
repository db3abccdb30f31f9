"""Read ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Any

from fnrecipe.data.stream import Cursor, Source, Stream, T
from fnrecipe.errors import FnrecipeError

_NAME = "prefetch"

_LOOK = 1.0
"""Seconds after which the consumer of an item looks whether the thread that makes it is still there."""

_PATIENCE = 0.5
"""Seconds for which the end of a stream waits for the thread, which may be stuck in a read."""


def prefetch(source: Source[T], cursor: Cursor = None, *, size: int) -> Stream[T]:
    """The same stream, up to `size` items ahead of its consumer; 0 reads ahead nothing.

    An error of the source is raised at the item that it took the place of. Closing the stream ends the thread, after the item
    that it is at.

    Raises:
        FnrecipeError: if the thread cannot be started, or ends before the stream does.
    """
    if size == 0:
        yield from source(cursor)
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(size)
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
    """Whether a thread is stuck in the read of an item of a stream that is closed."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def _take(ready: queue.Queue[Any], thread: threading.Thread) -> Any:
    while True:
        alive = thread.is_alive()  # asked first: what a dead thread has left behind is there by now
        try:
            return ready.get(timeout=_LOOK if alive else 0)
        except queue.Empty:
            if not alive:
                raise FnrecipeError(
                    "the thread that reads the data ahead ended before its stream did; out of memory?"
                ) from None


def _read(source: Source[Any], cursor: Cursor, ready: queue.Queue[Any], closed: threading.Event) -> None:
    stream: Stream[Any] = iter(())
    try:
        stream = source(cursor)
        for entry in stream:
            if not _put(ready, (entry, None), closed):
                return
        _put(ready, (None, None), closed)
    except BaseException as error:  # whatever it is, it belongs to the consumer
        _put(ready, (None, error), closed)
    finally:
        if isinstance(stream, Generator):
            stream.close()


def _put(ready: queue.Queue[Any], entry: Any, closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            ready.put(entry, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False
