"""Work beside the caller: one piece at a time, in order, on a thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from fnrecipe.errors import FnrecipeError


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
