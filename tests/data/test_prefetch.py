"""The thread that reads ahead: if it is gone, its consumer is told; if it is stuck, nobody waits for it."""

from __future__ import annotations

import threading

import pytest

from fnrecipe.data import Cursor, Source, Stream
from fnrecipe.data import prefetch as stage
from fnrecipe.errors import FnrecipeError


def counting(after: int, wait: threading.Event | None = None) -> Source[int]:
    """So many numbers, and then none until the event is set."""

    def source(cursor: Cursor = None) -> Stream[int]:
        yield from ((number, number) for number in range(after))
        if wait is not None:
            wait.wait()

    return source


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_while_it_hands_over_is_an_error_after_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from fnrecipe.data.prefetch import queue

    class Failing(queue.Queue):  # type: ignore[type-arg]
        def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
            if item != ((0, 0), None):
                raise MemoryError
            super().put(item, block, timeout)

    monkeypatch.setattr(queue, "Queue", Failing)
    stream = stage(counting(5), size=2)
    assert next(stream) == (0, 0)
    with pytest.raises(FnrecipeError, match="ended before its stream did; out of memory"):
        next(stream)


def test_a_thread_that_cannot_be_started_is_an_error_that_names_the_key() -> None:
    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        with pytest.raises(FnrecipeError, match=r"dataset\.prefetch: can't start new thread; 0 reads ahead nothing"):
            next(stage(counting(5), size=2))
    finally:
        threading.stack_size(before)


def test_closing_the_stream_does_not_wait_for_a_thread_that_is_stuck() -> None:
    stuck, before = threading.Event(), threading.enumerate()
    stream = stage(counting(1, wait=stuck), size=2)
    assert next(stream) == (0, 0)
    stream.close()  # type: ignore[attr-defined]
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert len(left) == 1
    stuck.set()
    left[0].join()
