"""The console: standard streams that cannot fail a command, and an outlet that a run never waits for."""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

_MOST = 1000
"""Pieces of text that wait for a console that stands still."""

_PATIENCE = 5.0
"""Seconds for which the end of a command waits for it."""


class Outlet:
    """A text file that takes everything at once; a thread shows it on `stream`, for as long as that can be written to.

    A write to a closed pipe, a closed terminal or a full disk fails; one to a pipe that nobody reads, or to a terminal that
    Ctrl-S has stopped, does not come back. Neither may reach a run, so both happen in the thread. Characters that the
    encoding lacks are shown as escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._terminal, self._left_out = False, 0
        self._pieces: SimpleQueue[str | None] = SimpleQueue()  # unlike a Queue's, its `put` is safe in a signal handler
        self._thread = threading.Thread(target=self._show, args=(stream,), name="console", daemon=True)
        with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            self._terminal = stream.isatty()  # type: ignore[union-attr]
            stream.flush()  # type: ignore[union-attr]
            with suppress(RuntimeError):  # no thread is to be had: nothing is shown
                self._thread.start()

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        if self._pieces.qsize() >= _MOST:
            self._left_out += 1
            return len(text)
        if self._left_out:
            self._pieces.put(f"({self._left_out:,} pieces of text were left out here: the console stood still)\n")
            self._left_out = 0
        self._pieces.put(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing: what is written is on its way."""

    def close(self) -> None:
        """Waits until all is shown, but not for a console that stands still."""
        self._pieces.put(None)
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)

    def _show(self, stream: TextIO) -> None:
        with suppress(OSError, ValueError):  # the console is gone; what comes now stays in the queue, up to its limit
            for piece in iter(self._pieces.get, None):
                _write(stream, piece, self.encoding)


def _write(stream: TextIO, text: str, encoding: str) -> None:
    rest = text.encode(encoding, "backslashreplace")
    if stream not in (sys.__stdout__, sys.__stderr__):  # captured, or a notebook's
        stream.write(rest.decode(encoding))
        stream.flush()
        return
    # By the descriptor: a thread that hangs in a write of Python's own stream would hold its lock, on which the interpreter
    # aborts when it flushes that stream at its end.
    while rest:
        try:
            rest = rest[os.write(stream.fileno(), rest) :]
        except BlockingIOError:
            select.select([], [stream], [])


def mend_streams() -> None:
    """Prepares standard streams for a command, before it opens a file.

    One that is closed is opened on the null device: a file would take its number, and all that is printed. What the encoding
    of the others lacks is printed as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def empty_streams() -> None:
    """Drops what a standard stream that fails still holds: on it the interpreter would end with a status of its own, 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def speak_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode where the locale knows ASCII only.

    There a name that is not ASCII reaches us in pieces that no text file may hold, and text that names a file opens none.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 this very program
