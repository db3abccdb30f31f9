"""The record of a run's rollbacks, `rollbacks.jsonl`: which batches of its stream are passed over.

A line for each rollback, in the order in which they were made. Batches are numbered from 1 as the stream gives them, also
those that are passed over. The record alone says which these are: so a run is that of a stream without them, whatever stopped
it and from whichever checkpoint it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import attrs

from fnrecipe.data import Cursor, Source, Stream
from fnrecipe.errors import UsageError, one_line
from fnrecipe.runtime.files import replace
from fnrecipe.shell.directory.layout import ROLLBACKS

T = TypeVar("T")


@attrs.frozen
class Passed:
    """The batches that are passed over: ranges of numbers, first and last, ascending and apart; after so many rollbacks."""

    ranges: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0

    def batch(self, step: int) -> int:
        """The number of the batch of a step; 0 for the state before the first one."""
        for first, last in self.ranges:
            step += last - first + 1 if step >= first else 0
        return step

    def __contains__(self, batch: int) -> bool:
        return any(first <= batch <= last for first, last in self.ranges)

    def behind(self, step: int, spike: int) -> range:
        """The batches that a rollback from the step `spike` to `step` passes over, with those that were before."""
        return range(self.batch(step + 1), self.batch(spike) + 1)

    def also(self, batches: range) -> Passed:
        """These and `batches`, by one rollback more.

        Raises:
            ValueError: if these are none.
        """
        if not 1 <= batches.start < batches.stop:
            raise ValueError(f"expected batches from 1 on, found {batches}")
        apart = [(first, last) for first, last in self.ranges if first not in batches and last not in batches]
        return Passed(tuple(sorted([*apart, (batches.start, batches.stop - 1)])), self.rollbacks + 1)


def read(out: Path) -> Passed:
    """What the run in `out` passes over.

    Raises:
        UsageError: if the record is not one that a run has written.
    """
    path, passed = out / ROLLBACKS, Passed()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return passed
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read it: {one_line(str(error))}") from None
    for number, line in enumerate(lines, 1):
        try:
            first, last = json.loads(line)["batches"]
            passed = passed.also(range(first, last + 1))
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            found = one_line(f"{type(error).__name__}: {error}")
            raise UsageError(f"{path}:{number}: expected the batches that a run passes over, found {found}") from None
    return passed


def record(out: Path, event: Mapping[str, object]) -> None:
    """Adds a rollback to the record, all of it or nothing."""
    path = out / ROLLBACKS
    before = path.read_bytes() if path.exists() else b""
    replace(path, before + json.dumps(event, allow_nan=False).encode() + b"\n")


def passing_over(source: Source[T], cursor: Cursor = None, *, step: int, passed: Passed) -> Stream[T]:
    """The batches behind `step` without those that are passed over."""
    for number, entry in enumerate(source(cursor), passed.batch(step) + 1):
        if number not in passed:
            yield entry


def num_passed_before(passed: Passed, step: int) -> int:
    """How many batches are passed over between a step's batch and that of the step before."""
    return passed.batch(step) - passed.batch(step - 1) - 1
