"""Work on threads: one piece at a time, in order, beside the caller; or several at once, for which the caller waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import TypeVar

from fnrecipe.errors import FnrecipeError

A = TypeVar("A")
B = TypeVar("B")


def map_at_once(work: Callable[[A], B], items: Sequence[A], limit: int) -> list[B]:
    """The results of `work` of each item; up to `limit` of them are worked on at once, on as many threads as can be started.

    The caller's is one of these. If work fails no more is begun, and the error is raised once all that was begun has ended.
    """
    left, results, errors = deque(enumerate(items)), dict[int, B](), dict[int, BaseException]()

    def run() -> None:
        while not errors:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            try:
                results[number] = work(item)
            except BaseException as error:  # raised where somebody hears it
                errors[number] = error

    started = list[Thread]()
    with suppress(RuntimeError):  # no more threads are allowed
        for _ in range(min(len(items), limit) - 1):
            thread = Thread(target=run, name="map_at_once")
            thread.start()
            started.append(thread)
    run()
    for thread in started:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(items))]


class Background:
    """What `start` is given runs on a thread. An error of it is raised, once, by the caller's next call of a method.

    The thread does not keep the process alive: who wants the work done has to wait for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts `work` once the one before has ended.

        Raises:
            FnrecipeError: if the thread cannot be started.
        """
        self.wait()
        thread = Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as problem:
            raise FnrecipeError(f"{self._name}: {problem}") from problem
        self._thread = thread

    @property
    def busy(self) -> bool:
        """Whether the work has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises the error of work that has ended with one."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until the work has ended, at most so many seconds."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if not self._thread.is_alive():
            error, self._thread, self._error = self._error, None, None
            if error is not None:
                raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised where somebody hears it
            self._error = error
