"""Errors and warnings on the console."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from functools import partial

import click

from fnrecipe.errors import redacted
from fnrecipe.shell.screen.console import Outlet
from fnrecipe.shell.screen.once import Once


class _Redacting(logging.Formatter):
    """Shows no secret of an address."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def show(text: str, rank: int | None = None) -> None:
    """Writes each line of `text` to standard error with a prefix; indented lines continue the line before them."""
    prefix = "error: " if rank is None else f"rank {rank}: error: "
    with closing(Outlet(sys.stderr)) as errors:
        for line in text.splitlines():
            errors.write(f"{line if line.startswith(' ') else prefix + line}\n")


def show_warnings() -> None:
    """Writes warnings to standard error until the command ends; those marked `once` are written once."""
    logger, handler = logging.getLogger("fnrecipe"), logging.StreamHandler()
    handler.setFormatter(_Redacting())
    handler.addFilter(Once())
    logger.addHandler(handler)
    click.get_current_context().call_on_close(partial(logger.removeHandler, handler))
