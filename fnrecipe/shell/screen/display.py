"""What a run shows: lines in the console and its log, and a progress bar where the console is a terminal.

Neither may end a run. The console is never waited for (`fnrecipe.shell.screen.console`). A log that cannot be written any more,
on a full disk say, is told of once, and has a gap; the records of the run (`fnrecipe.shell.recording`) may have none, so there
it is an error.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fnrecipe.errors import FnrecipeError, redacted
from fnrecipe.recipe import Row
from fnrecipe.runtime.signals import Stopped
from fnrecipe.shell.recording.throughput import Speed
from fnrecipe.shell.screen.console import Outlet
from fnrecipe.shell.screen.once import Once

_LOG = logging.getLogger("fnrecipe")


class _Lines(logging.Handler):
    """Gives warnings to a function."""

    def __init__(self, line: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(Once())
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line(record.getMessage())


class Display:
    """While entered, `line`, `step` and warnings of fnrecipe write to the console, unless it is quiet, and to the file `log`.

    The log begins with the command, and also has the error that ends the run; each of its lines has date, time and time zone.
    """

    def __init__(self, log: Path, total: int | None, *, quiet: bool = False) -> None:
        self._total = total
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)  # nothing is left over to fail again when it is closed
        self._gap = False
        self._outlet = Outlet(None if quiet else sys.stdout)
        outlet = cast("IO[str]", self._outlet)
        self._console = Console(file=outlet, force_terminal=outlet.isatty(), highlight=False, soft_wrap=True)
        if not self._console.width:  # COLUMNS=0
            self._console.width = 80
        self._bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            expand=True,
            disable=not self._bar,
            transient=True,
        )
        self._task: TaskID | None = None
        self._warnings = _Lines(self.line)

    def __enter__(self) -> Display:
        self._write(f"command: {shlex.join(sys.argv)}")
        self._progress.start()
        _LOG.addHandler(self._warnings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _LOG.removeHandler(self._warnings)
        self._progress.stop()
        if isinstance(error, Stopped):
            self.line(str(error))
        elif isinstance(error, FnrecipeError):
            self._write(f"error: {error}")  # the command line shows it
        elif error is not None:
            self._write("".join(traceback.format_exception(error)).rstrip())
        self._outlet.close()
        self._log.close()

    def line(self, text: str) -> None:
        self._write(text)
        self._print(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows `text` and a moving bar for as long as the context lasts; a line where the console is no terminal."""
        self._write(text)
        if not self._bar:
            self._print(text)
        task = self._progress.add_task(text, total=None, facts="")
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def step(self, metrics: Row, speed: Speed) -> None:
        """Shows the metrics of the newest step."""
        number = int(metrics["step"])
        facts = step_facts(metrics, speed, self._total)
        step = f"step {number:,}{f'/{self._total:,}' if self._total else ''}"
        self._write(f"{step}  {facts}")
        if not self._bar:
            self._print(f"{step}  {facts}")
        elif self._task is None:
            self._task = self._progress.add_task(step, total=self._total, completed=number, facts=facts)
        else:
            self._progress.update(self._task, description=step, completed=number, facts=facts)

    def _print(self, text: str) -> None:
        self._console.print(redacted(text), markup=False)

    def _write(self, text: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        data = "".join(f"{now}  {line}\n" for line in redacted(text).split("\n")).encode("utf-8", "backslashreplace")
        try:
            if self._log.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._gap:
                self._print(f"{self._log.name}: cannot write: {error.strerror}; the run goes on, and this log has gaps")
            self._gap = True


def step_facts(metrics: Row, speed: Speed, total: int | None) -> str:
    """`loss 1.234  lr 2.0e-03  7,700 tokens/s  eta 1m05s`."""
    facts = [f"loss {metrics['train/loss']:.3f}"]
    if "train/lr" in metrics:
        facts.append(f"lr {metrics['train/lr']:.1e}")
    facts.append(f"{speed.tokens_per_second:,.0f} tokens/s")
    if speed.mfu is not None:
        facts.append(f"{speed.mfu:.1%} MFU")
    if "train/loss_scale" in metrics:
        facts.append(f"loss scale {metrics['train/loss_scale']:g}")
    if metrics["train/skipped"]:
        why = "as not finite" if "train/spike" not in metrics else "as a spike" if metrics["train/spike"] else ""
        facts.append(f"{int(metrics['train/skipped'])} skipped {why}".rstrip())
    if total and speed.steps_per_second:
        facts.append(f"eta {duration((total - metrics['step']) / speed.steps_per_second)}")
    return "  ".join(facts)


def duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h03m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
