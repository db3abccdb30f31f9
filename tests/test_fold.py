"""The fold: one step a batch, no batch before its time."""

from __future__ import annotations

from collections.abc import Iterator

from fnrecipe.fold import fold


def step(state: str, batch: str) -> tuple[str, dict[str, str]]:
    return state + batch, {"saw": batch}


def test_states_follow_from_each_other_and_come_with_metrics_and_cursor() -> None:
    folded = list(fold(step, "", iter([("a", 1), ("b", 2), ("c", 3)])))
    assert folded == [("a", {"saw": "a"}, 1), ("ab", {"saw": "b"}, 2), ("abc", {"saw": "c"}, 3)]


def test_an_empty_stream_gives_nothing() -> None:
    assert list(fold(step, "state", iter([]))) == []


def test_a_batch_is_taken_only_when_its_step_is_asked_for() -> None:
    taken: list[int] = []

    def stream() -> Iterator[tuple[str, int]]:
        for number in range(10):
            taken.append(number)
            yield "x", number

    folded = fold(step, "", stream())
    assert taken == []
    next(folded)
    next(folded)
    assert taken == [0, 1]


def test_going_on_from_any_state_and_cursor_gives_the_same_tail() -> None:
    batches = "abcdefg"

    def stream(start: int) -> Iterator[tuple[str, int]]:
        return iter([(batches[i], i + 1) for i in range(start, len(batches))])

    whole = list(fold(step, "", stream(0)))
    for number, (state, _, cursor) in enumerate(whole, 1):
        assert list(fold(step, state, stream(cursor))) == whole[number:]
