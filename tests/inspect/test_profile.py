"""The measure of what was busy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.inspect.profile import covered

MOMENTS = st.integers(0, 30)


@given(st.lists(st.tuples(MOMENTS, MOMENTS).map(lambda pair: (min(pair), max(pair)))))
def test_overlapping_intervals_count_once(intervals: list[tuple[int, int]]) -> None:
    assert covered(intervals) == len({moment for first, last in intervals for moment in range(first, last)})
