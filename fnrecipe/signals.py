"""Signals as a value that the loop looks at between steps."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0, signal.SIGHUP: 129}


class Signals:
    """While entered, notes the first of EXIT_STATUS's signals in `received`; the second has its usual effect.

    With `once` the second has none: launchers send a rank what came to its whole process group as well, and force its end.
    """

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and self._once:
            return
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
