from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fnrecipe.data import Cursor, Source, Stream, mix, weights_between
from tests.data.laws import check_resumes, items, listed

Finished = Literal["drop", "repeat", "stop"]
Weights = Callable[[int], Sequence[float]]
Line = list[tuple[int, float]]

FINISHED: list[Finished] = ["drop", "repeat", "stop"]
FLOAT = 1e-6  # the product counts in floats, the tests in fractions


class Item(NamedTuple):
    source: int
    epoch: int
    place: int
    size: int


def epochs_of(number: int, sizes: Sequence[int]) -> Callable[[int], Source[Item]]:
    return lambda epoch: listed([Item(number, epoch, place, size) for place, size in enumerate(sizes)])


def mixed(sizes: Sequence[Sequence[int]], weights: Weights | Sequence[float], **options: Any) -> Source[Item]:
    sources = [epochs_of(number, mine) for number, mine in enumerate(sizes)]
    schedule = weights if callable(weights) else lambda total: weights
    return partial(mix, sources, weights=schedule, size=lambda item: item.size, **options)


def first(source: Source[Item], limit: int) -> list[Item]:
    return [item for item, _ in islice(source(None), limit)]


def numbers(found: Sequence[Item]) -> list[int]:
    return [item.source for item in found]


@st.composite
def mixtures(draw: st.DrawFn, min_size: int = 0) -> tuple[list[list[int]], list[int]]:
    """The sizes of the items of some sources, and a weight for each source."""
    n = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.lists(st.integers(1, 50), min_size=min_size, max_size=8), min_size=n, max_size=n))
    return sizes, draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))


LINES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9)), min_size=1, max_size=4, unique_by=lambda point: point[0])


@st.composite
def schedules(draw: st.DrawFn, n: int) -> list[Line]:
    """Lines for `n` sources, of which the first always has a weight."""
    lines: list[Line] = [sorted((total, float(weight)) for total, weight in draw(LINES)) for _ in range(n)]
    lines[0] = [(total, weight + 1) for total, weight in lines[0]]
    return lines


def slow_weights(lines: Sequence[Line], scale: int = 1) -> Weights:
    return lambda total: [float(np.interp(total * scale, *map(list, zip(*line, strict=True)))) for line in lines]


def check_shares(found: Sequence[Item], weights: Weights, n: int) -> None:
    """No source is ahead of the integral of its share by more than the item it gave, nor behind by what others are ahead."""
    share, used, total, largest = [Fraction(0)] * n, [0] * n, 0, 0
    for item in found:
        now = list(map(Fraction, weights(total)))
        assert now[item.source] > 0
        share = [s + item.size * w / sum(now) for s, w in zip(share, now, strict=True)]
        used[item.source] += item.size
        total, largest = total + item.size, max(largest, item.size)
        assert used[item.source] - share[item.source] <= item.size + FLOAT
        assert max(s - u for s, u in zip(share, used, strict=True)) <= (n - 1) * largest + FLOAT


@given(mixtures(min_size=1))
def test_no_source_is_ahead_of_its_share_by_more_than_an_item(mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    check_shares(first(mixed(sizes, weights), 60), lambda total: weights, len(sizes))


@given(data=st.data(), mixture=mixtures(min_size=1))
def test_shares_follow_the_integral_of_the_weights(data: st.DataObject, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, _ = mixture
    lines = [[(total, weight + 1) for total, weight in line] for line in data.draw(schedules(len(sizes)))]
    check_shares(first(mixed(sizes, weights_between(lines)), 60), slow_weights(lines), len(sizes))


class Ended(NamedTuple):
    source: int


def logged(number: int, sizes: Sequence[int], log: list[Any]) -> Callable[[int], Source[Item]]:
    """A source that notes when it is found to be at its end."""

    def source(cursor: Cursor = None) -> Stream[Item]:
        yield from epochs_of(number, sizes)(0)(cursor)
        log.append(Ended(number))

    return lambda epoch: source


@given(mixtures())
@example(([[1], [100] * 3, [1] * 200], [10, 9, 1]))
def test_the_others_share_what_a_source_that_drops_out_was_owed(mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    log: list[Any] = []
    sources = [logged(number, mine, log) for number, mine in enumerate(sizes)]
    for item, _ in mix(sources, weights=lambda total: weights, size=lambda item: item.size, epochs=1):
        log.append(item)
    live, ahead = dict(enumerate(weights)), [Fraction(0)] * len(weights)
    for event in log:
        if isinstance(event, Ended):
            del live[event.source]
        amount = -ahead[event.source] if isinstance(event, Ended) else event.size
        for i, weight in live.items():
            ahead[i] -= Fraction(amount * weight, sum(live.values()))
        ahead[event.source] += amount
        assert isinstance(event, Ended) or ahead[event.source] <= event.size + FLOAT


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (5.0, 1e-3), (1e-3, 2.0)])
def test_two_sources_are_exact_to_an_item_after_any_prefix(weights: tuple[float, float]) -> None:
    sizes = [1 + 37 * i % 11 for i in range(4000)]
    used = [0, 0]
    for item in first(mixed([sizes, sizes[::-1]], weights), 3000):
        used[item.source] += item.size
        assert abs(used[0] - weights[0] / sum(weights) * sum(used)) <= 11


def test_shares_of_a_long_run_are_the_weights_to_an_item() -> None:
    weights = [0.5, 0.3, 0.15, 0.05]
    used = Counter[int]()
    for item in first(mixed([[7, 3], [1, 2, 9], [4], [5, 5, 1]], weights), 20_000):
        used[item.source] += item.size
    assert all(abs(used[i] - weight * used.total()) <= 9 for i, weight in enumerate(weights))


@given(data=st.data(), lines=st.integers(1, 3).flatmap(schedules), scale=st.integers(1, 8))
def test_weights_are_straight_between_points_and_flat_beyond(data: st.DataObject, lines: list[Line], scale: int) -> None:
    weights = weights_between(lines, scale=scale)
    for total in [0, 1000, *(x // scale for line in lines for x, _ in line), data.draw(st.integers(0, 400))]:
        assert weights(total) == pytest.approx(slow_weights(lines, scale)(total))


def test_weights_written_out() -> None:
    weights = weights_between([[(0, 1.0), (100, 1.0), (200, 3.0)], [(50, 4.0)]])
    assert [weights(total) for total in (0, 100, 150, 199, 200, 999)] == [[w, 4.0] for w in (1, 1, 2, 2.98, 3, 3)]
    assert weights_between([[(0, 1.0), (100, 2.0)]], scale=4)(20) == [1.8]


@pytest.mark.parametrize("scale", [1, 4])
def test_shares_of_a_window_follow_the_schedule(scale: int) -> None:
    lines: list[Line] = [[(4000, 1.0), (12000, 3.0), (16000, 3.0)], [(4000, 1.0), (12000, 0.5), (16000, 0.0)]]
    found = first(mixed([[3, 1, 5], [2, 4]], weights_between(lines, scale=scale)), 8000)
    totals = np.array(list(accumulate(item.size for item in found)))
    mine = np.array([item.size if item.source == 0 else 0 for item in found])
    for start in range(0, 20_000 // scale, 500):
        weights = np.array([slow_weights(lines, scale)(total) for total in range(start, start + 500)])
        expected = (weights[:, 0] / weights.sum(1)).sum()
        assert mine[(totals > start) & (totals <= start + 500)].sum() == pytest.approx(expected, abs=10 + 2)


def test_a_source_of_weight_zero_gives_nothing_until_it_rises() -> None:
    weights = weights_between([[(0, 1.0)], [(0, 0.0), (300, 0.0), (301, 1.0), (600, 1.0), (601, 0.0)]])
    found = first(mixed([[1], [1]], weights), 1000)
    assert numbers(found[:301]) == [0] * 301
    assert abs(sum(numbers(found[301:601])) - 150) <= 1
    assert numbers(found[602:]) == [0] * 398


@given(data=st.data(), mixture=mixtures(min_size=1))
def test_only_sources_with_a_weight_give_items(data: st.DataObject, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, _ = mixture
    lines = data.draw(schedules(len(sizes)))
    weights, total = slow_weights(lines), 0
    for item in first(mixed(sizes, weights_between(lines)), 60):
        assert weights(total)[item.source] > 0
        total += item.size


def test_the_end_when_only_sources_of_weight_zero_are_left() -> None:
    weights = weights_between([[(0, 1.0)], [(5, 0.0), (6, 1.0)]])
    assert numbers(items(mixed([[1] * 4, [1]], weights, epochs=1))) == [0] * 4
    assert numbers(items(mixed([[1] * 7, [1]], weights, epochs=1))) == [0] * 6 + [0, 1]


def sequence(number: int, sizes: Sequence[int], epochs: int) -> list[Item]:
    return [Item(number, epoch, place, size) for epoch in range(epochs) for place, size in enumerate(sizes)]


def by_source(found: Sequence[Item], n: int) -> list[list[Item]]:
    return [[item for item in found if item.source == number] for number in range(n)]


@pytest.mark.parametrize("epochs", [1, 3])
@given(mixture=mixtures())
def test_drop_gives_each_source_exactly_its_epochs(epochs: int, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    found = items(mixed(sizes, weights, epochs=epochs, finished="drop"))
    assert by_source(found, len(sizes)) == [sequence(number, mine, epochs) for number, mine in enumerate(sizes)]


@pytest.mark.parametrize("epochs", [1, 3])
@settings(max_examples=50)
@given(mixture=mixtures(min_size=1))
def test_repeat_ends_with_the_last_source(epochs: int, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    parts = by_source(first(mixed(sizes, weights, epochs=epochs, finished="repeat"), 20_000), len(sizes))
    for number, (mine, part) in enumerate(zip(sizes, parts, strict=True)):
        assert part == sequence(number, mine, len(part) // len(mine) + 1)[: len(part)]
    assert min(len(part) - epochs * len(mine) for mine, part in zip(sizes, parts, strict=True)) == 0


@pytest.mark.parametrize("epochs", [1, 3])
@settings(max_examples=50)
@given(mixture=mixtures(min_size=1))
def test_stop_ends_with_the_first_source(epochs: int, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    parts = by_source(items(mixed(sizes, weights, epochs=epochs, finished="stop")), len(sizes))
    whole = [sequence(number, mine, epochs) for number, mine in enumerate(sizes)]
    assert all(part == mine[: len(part)] for part, mine in zip(parts, whole, strict=True))
    assert any(part == mine for part, mine in zip(parts, whole, strict=True))


@pytest.mark.parametrize("finished", FINISHED)
@settings(max_examples=50)
@given(mixture=mixtures())
def test_without_epochs_sources_are_read_again_and_again(finished: Finished, mixture: tuple[Any, list[int]]) -> None:
    sizes, weights = mixture
    assume(any(sizes))
    found = first(mixed(sizes, weights, finished=finished), 100)
    assert len(found) == 100
    for number, (mine, part) in enumerate(zip(sizes, by_source(found, len(sizes)), strict=True)):
        assert part == sequence(number, mine, 100)[: len(part)]


ENDS: dict[str, tuple[Finished, int | None, list[int]]] = {
    "drop": ("drop", 1, [0, 1, 0, 1, 1, 1]),
    "drop after two epochs": ("drop", 2, [0, 1] * 4 + [1] * 4),
    "repeat": ("repeat", 1, [0, 1] * 4 + [0]),  # the first goes on until the second is asked for more
    "stop": ("stop", 1, [0, 1, 0, 1]),
    "stop after two epochs": ("stop", 2, [0, 1] * 4),
    "no end": ("drop", None, [0, 1] * 10),
}


@pytest.mark.parametrize("empties", [0, 1, 3])
@pytest.mark.parametrize("name", ENDS)
def test_ends_written_out_with_sources_that_are_empty_from_the_start(name: str, empties: int) -> None:
    finished, epochs, expected = ENDS[name]
    sizes = [[1] * 2, [1] * 4, *[[]] * empties]
    assert numbers(first(mixed(sizes, [1.01, *[1] * (1 + empties)], epochs=epochs, finished=finished), 20)) == expected


@pytest.mark.parametrize("epochs", [1, 3, None])
@pytest.mark.parametrize("finished", FINISHED)
def test_only_empty_sources(finished: Finished, epochs: int | None) -> None:
    assert items(mixed([[], []], [1, 2], epochs=epochs, finished=finished)) == []
    assert items(mixed([], [], epochs=epochs, finished=finished)) == []


def test_a_source_that_has_no_items_in_a_later_epoch_is_left_out() -> None:
    def fading(epoch: int) -> Source[Item]:
        return listed([Item(0, epoch, 0, 1)] * (2 - epoch))

    source: Source[Item] = partial(mix, [fading, epochs_of(1, [1])], weights=lambda total: [1, 1], size=lambda item: 1)
    assert numbers(first(source, 20)) == [0, 1] * 3 + [1] * 14
    check_resumes(source, limit=20)


@pytest.mark.parametrize("epochs", [1, 3, None])
@pytest.mark.parametrize("finished", FINISHED)
@settings(max_examples=30)
@given(data=st.data(), mixture=mixtures())
@example(data=None, mixture=([[100, 1, 1], [1] * 4, []], [1, 1, 1]))
def test_mix_resumes(finished: Finished, epochs: int | None, data: Any, mixture: tuple[list[list[int]], list[int]]) -> None:
    sizes, weights = mixture
    lines = data.draw(schedules(len(sizes))) if data else [[(0, float(weight))] for weight in weights]
    check_resumes(mixed(sizes, weights_between(lines), epochs=epochs, finished=finished), limit=25)


def test_cursors_are_small() -> None:
    cursors = [cursor for _, cursor in islice(mixed([[3, 5, 7] * 40, [2, 9, 1]], [0.7, 0.3])(None), 2000)]
    assert max(len(json.dumps(cursor)) for cursor in cursors) < 100


def test_none_is_an_item() -> None:
    source: Source[None] = partial(
        mix, [lambda epoch: listed([None, None])], weights=lambda total: [1], size=lambda item: 1, epochs=1
    )
    assert items(source) == [None, None]
