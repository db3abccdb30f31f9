"""What a run shows: lines in the console and its log, and a progress bar where the console is a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fnrecipe.once import Once
from fnrecipe.speed import Speed

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

    A console that is gone is ignored.
    """

    def __init__(self, log: Path, total: int | None, *, quiet: bool = False) -> None:
        self._total = total
        self._quiet = quiet
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", buffering=1)
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            expand=True,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._warnings = _Lines(self.line)

    def __enter__(self) -> Display:
        self._progress.start()
        _LOG.addHandler(self._warnings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _LOG.removeHandler(self._warnings)
        self._progress.stop()
        self._log.close()

    def line(self, text: str) -> None:
        self._log.write(text + "\n")
        self._print(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows `text` and a moving bar for as long as the context lasts; a line where the console is no terminal."""
        self._log.write(text + "\n")
        if not self._console.is_terminal:
            self._print(text)
        task = self._progress.add_task(text, total=None, facts="")
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def step(self, metrics: Mapping[str, Any], speed: Speed) -> None:
        """Shows the metrics of the newest step."""
        number = int(metrics["step"])
        facts = step_facts(metrics, speed, self._total)
        step = f"step {number:,}{f'/{self._total:,}' if self._total else ''}"
        self._log.write(f"{step}  {facts}\n")
        if not self._console.is_terminal:
            self._print(f"{step}  {facts}")
        elif self._task is None:
            self._task = self._progress.add_task(step, total=self._total, completed=number, facts=facts)
        else:
            self._progress.update(self._task, description=step, completed=number, facts=facts)

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        with suppress(OSError):  # nobody reads the console any more; the log file still has every line
            self._console.print(text, markup=False)


def step_facts(metrics: Mapping[str, Any], speed: Speed, total: int | None) -> str:
    """`loss 1.234  lr 2.0e-03  7,700 tokens/s  eta 1m05s`."""
    facts = [f"loss {metrics['loss']:.3f}"]
    if "learning_rate" in metrics:
        facts.append(f"lr {metrics['learning_rate']:.1e}")
    facts.append(f"{speed.tokens_per_second:,.0f} tokens/s")
    if speed.mfu is not None:
        facts.append(f"{speed.mfu:.1%} MFU")
    if "loss_scale" in metrics:
        facts.append(f"loss scale {metrics['loss_scale']:g}")
    if metrics["skipped"]:
        facts.append(f"{int(metrics['skipped'])} skipped as not finite")
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
