"""The record of rollbacks: numbers of batches, against a list of those that are left; and what is no record."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.errors import UsageError
from fnrecipe.shell.directory.layout import ROLLBACKS
from fnrecipe.shell.guards.rollbacks import Passed, num_passed_before, passing_over, read, record

MANY = 400


def source(cursor: int | None) -> list[tuple[str, int]]:
    return [(f"batch {number}", number) for number in range((cursor or 0) + 1, MANY)]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=6), st.integers(0, 50))
def test_it_is_the_stream_without_what_each_rollback_passed_over(rollbacks: list[tuple[int, int]], start: int) -> None:
    left, passed = list(range(1, MANY)), Passed()
    for step, length in rollbacks:  # from the step `step + length` back to `step`
        batches = passed.behind(step, step + length)
        del left[step : step + length]
        passed = passed.also(batches)
    assert passed.rollbacks == len(rollbacks)
    assert [passed.batch(step) for step in range(1, 100)] == left[:99]
    assert passed.batch(0) == 0
    assert [number for number in range(1, left[99]) if number not in passed] == left[:99]
    assert [num_passed_before(passed, step) for step in range(1, 50)] == [
        b - a - 1 for a, b in zip([0, *left], left[:49], strict=False)
    ]
    found = list(passing_over(lambda cursor: iter(source(cursor)), passed.batch(start), step=start, passed=passed))
    assert found == [(f"batch {number}", number) for number in left[start:]]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read(tmp_path) == Passed()
    for batches in ([7, 9], [4, 12], [40, 40]):
        record(tmp_path, {"step": 9, "batches": batches})
    assert read(tmp_path) == Passed(((4, 12), (40, 40)), 3)


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"batches": [3]}', '{"batches": [3, 2]}', '{"batches": ["a", 2]}'])
def test_what_is_no_record_is_told_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / ROLLBACKS).write_text(f'{{"batches": [1, 2]}}\n{line}\n')
    with pytest.raises(UsageError, match=r"rollbacks\.jsonl:2: expected the batches that a run passes over, found "):
        read(tmp_path)
