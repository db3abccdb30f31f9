"""Work on threads: beside the caller in order, one piece at a time; or several at once. No error of it is lost."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest

from fnrecipe.errors import FnrecipeError
from fnrecipe.runtime.background import Background, map_at_once


def test_each_piece_begins_when_the_one_before_has_ended() -> None:
    found: list[str] = []
    background = Background("work")

    def work(number: int) -> None:
        found.append(f"begin {number}")
        time.sleep(0.02)
        found.append(f"end {number}")

    for number in range(3):
        background.start(partial(work, number))
    background.wait()
    assert found == [f"{what} {number}" for number in range(3) for what in ("begin", "end")]


def test_the_caller_goes_on_meanwhile_and_waits_no_longer_than_it_says() -> None:
    go, background = threading.Event(), Background("work")
    background.start(lambda: assert_set(go))
    background.check()
    background.wait(0.01)
    go.set()
    background.wait()


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


def fail(text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize("call", ["check", "wait", "start"])
def test_an_error_is_raised_once_by_the_next_call(call: str) -> None:
    background = Background("work")
    background.start(partial(fail, "first"))
    while any(thread.name == "work" for thread in threading.enumerate()):
        time.sleep(0.001)
    with pytest.raises(ValueError, match="first"):
        getattr(background, call)(*[partial(fail, "second")] * (call == "start"))
    background.check()
    background.wait()


def test_a_thread_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    background = Background("regime.checkpoint_in_background")
    with pytest.raises(FnrecipeError, match=r"^regime\.checkpoint_in_background: can't start new thread$"):
        background.start(lambda: None)
    background.wait()


@pytest.mark.parametrize("limit", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_are_in_the_order_of_the_items(count: int, limit: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return 10 * number

    assert map_at_once(work, range(count), limit) == [10 * number for number in range(count)]


def test_as_many_are_worked_on_at_once_as_the_limit_says() -> None:
    together = threading.Barrier(3, timeout=10)
    map_at_once(lambda _: together.wait(), range(6), limit=3)


def test_the_first_error_is_raised_once_all_has_ended_and_no_more_is_begun() -> None:
    together, begun, ended = threading.Barrier(2, timeout=10), list[int](), list[int]()

    def work(number: int) -> None:
        begun.append(number)
        together.wait()
        if number == 0:
            raise KeyError("first")
        time.sleep(0.02)
        ended.append(number)
        raise OSError("second")

    with pytest.raises(KeyError, match="first"):
        map_at_once(work, range(5), limit=2)
    assert sorted(begun) == [0, 1]
    assert ended == [1]


def test_where_no_thread_can_be_started_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert map_at_once(lambda number: (number, threading.current_thread()), range(3), limit=3) == [
        (number, threading.main_thread()) for number in range(3)
    ]
