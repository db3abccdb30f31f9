"""Warnings that are to be given once, wherever they come from: their records have an attribute `once`."""

from __future__ import annotations

import logging


class Once(logging.Filter):
    """Lets a record with a value of `once` pass the first time only, and every other one always."""

    def __init__(self) -> None:
        super().__init__()
        self._given: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        once = getattr(record, "once", None)
        if once in self._given:
            return False
        if once is not None:
            self._given.add(once)
        return True
