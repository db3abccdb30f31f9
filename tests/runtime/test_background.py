"""Work beside the caller: in order, one piece at a time, and no error of it is lost."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from fnrecipe.errors import FnrecipeError
from fnrecipe.runtime.background import Background


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
