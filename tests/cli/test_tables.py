"""Long tables end with the sum of what they leave out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.cli.tables import shortened


@given(st.lists(st.tuples(st.text(max_size=3), st.integers())), st.integers(1, 30))
def test_nothing_is_lost_and_only_what_is_too_much_is_summed(rows: list[tuple[str, int]], limit: int) -> None:
    found = shortened(rows, sum, limit)
    assert sum(value for _, value in found) == sum(value for _, value in rows)
    assert found[:limit] == rows[:limit]
    assert [name for name, _ in found[limit:]] == ([f"{len(rows) - limit} others"] if len(rows) > limit else [])
