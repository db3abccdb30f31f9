"""Read ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Any

from fnrecipe.data.stream import Cursor, Source, Stream, T


def prefetch(source: Source[T], cursor: Cursor = None, *, size: int) -> Stream[T]:
    """The same stream, up to `size` items ahead of its consumer; 0 reads ahead nothing.

    An error of the source is raised at the item that it took the place of. Closing the stream ends the thread.
    """
    if size == 0:
        yield from source(cursor)
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(size)
    closed = threading.Event()
    thread = threading.Thread(target=_read, args=(source, cursor, ready, closed), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            entry, error = ready.get()
            if error is not None:
                raise error
            if entry is None:
                return
            yield entry
    finally:
        closed.set()
        thread.join()


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
