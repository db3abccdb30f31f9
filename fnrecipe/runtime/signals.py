"""Signals as a value that the loop reads between steps, and that can interrupt its waiting."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from fnrecipe.data.stream import Cursor, Source, Stream, T
from fnrecipe.errors import EXIT_AGAIN

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: EXIT_AGAIN, signal.SIGHUP: 129, signal.SIGUSR1: EXIT_AGAIN}
ALARM = signal.SIGALRM
"""The signal that a process gets when the time is up that it was given; `EXIT_AGAIN` goes with it."""
_ECHO = 0.1
"""Seconds."""


class Stopped(BaseException):
    """A signal arrived while there was nothing to finish first."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"{number.name}: ended before a step was made; nothing is lost")
        self.number = number


def heard() -> list[signal.Signals]:
    """The signals that end a run; without SIGHUP where that is ignored, as under nohup."""
    return [n for n in EXIT_STATUS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class Signals:
    """While entered, records the first of SIGINT, SIGTERM, SIGHUP and SIGUSR1 in `received`; a second has its default effect.

    seconds  after these `ALARM` comes and is recorded too; it is neither a first signal nor a second
    parting  the message that a second one writes to standard error
    at_once  whether the first also raises `Stopped`
    once     whether a second one is ignored: a launcher forwards what the rank got as a member of the process group, too,
             and ends the rank by other means

    The same signal within `_ECHO` seconds counts once: `timeout`, say, signals both the process and its group.

    Python delivers signals to the main thread only; entered in another one, nothing is recorded.
    """

    def __init__(
        self, parting: Callable[[], str] = str, *, seconds: float | None = None, at_once: bool = False, once: bool = False
    ) -> None:
        self._seconds = seconds
        self.received: signal.Signals | None = None
        self._when, self._once = 0.0, once
        self.at_once = at_once
        self._parting = parting
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            numbers = [*heard(), *([] if self._seconds is None else [ALARM])]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
            if self._seconds is not None:
                signal.setitimer(signal.ITIMER_REAL, max(self._seconds, 1e-3))  # 0 would be never
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if ALARM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While entered, a signal raises `Stopped`; one that was recorded before raises at once."""
        self.at_once = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self.at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self.received in (None, ALARM)
        if not first and number == ALARM:
            return
        before, self._when = self._when, time.monotonic()
        if not first and (self._once or (number == self.received and self._when < before + _ECHO)):
            return
        if not first:
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):
                os.write(2, self._parting().encode())
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        if self.at_once:
            raise Stopped(self.received)


def until_signal(source: Source[T], cursor: Cursor = None, *, signals: Signals) -> Stream[T]:
    """The same items, until a signal arrives during the wait for one; it interrupts the wait at once."""
    stream = source(cursor)
    while True:
        try:
            with signals.interruptible():
                entry = next(stream, None)
        except Stopped:
            return
        if entry is None:
            return
        yield entry
