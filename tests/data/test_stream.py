from __future__ import annotations

import gc
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.data import (
    Cursor,
    Source,
    Stream,
    filter_items,
    growing,
    map_chunks,
    map_items,
    map_windows,
    mix,
    pipe,
    prefetch,
    repeat,
    sift,
    tolerate,
    weights_between,
)
from fnrecipe.errors import DataError
from tests.data.laws import check_resumes, items, listed

Stage = Callable[[Source[int]], Source[int]]
Finished = Literal["drop", "repeat", "stop"]

NUMBERS = st.lists(st.integers(-9, 99), max_size=12)

# Functions of a window: as many outputs as inputs, none, some, more, and one that depends on the window's number.
WINDOWS: dict[str, Callable[[Sequence[int], int], Sequence[int]]] = {
    "reverse": lambda window, index: window[::-1],
    "nothing": lambda window, index: [],
    "odd ones": lambda window, index: [x for x in window if x % 2],
    "every other window": lambda window, index: window if index % 2 else (),
    "twice": lambda window, index: [*window, *window],
    "with index": lambda window, index: [index, sum(window)],
}


def bind(stage: Callable[..., Stream[Any]], **options: Any) -> Stage:
    return lambda source: pipe(source, partial(stage, **options))


def negated(x: int) -> int:
    return -x


def bad(x: int) -> int | DataError:
    return DataError(f"data.jsonl:{x}: expected text") if x % 5 == 0 else x


def chunks(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def epochs_of(source: Source[int]) -> Callable[[int], Source[int]]:
    """Epochs that differ, so that a wrong one shows."""
    return lambda epoch: pipe(source, partial(map_items, function=lambda x: x + 100 * epoch))


def blended(source: Source[int], other: Sequence[int], weight: int, finished: Finished) -> Source[int]:
    sources = [epochs_of(source), epochs_of(listed(other))]
    weights = weights_between([[(0, 1.0)], [(0, weight), (20, 1.0)]])
    return partial(mix, sources, weights=weights, size=lambda x: 1 + abs(x) % 3, epochs=2, finished=finished)


STAGES: dict[str, st.SearchStrategy[Stage]] = {
    "each": st.just(bind(map_items, function=negated)),
    "keep": st.integers(1, 4).map(lambda n: bind(filter_items, where=lambda x: x % n == 0)),
    "chunked": st.integers(1, 5).map(lambda n: bind(map_chunks, size=n, function=lambda chunk: [x + 1 for x in chunk])),
    "regroup": st.builds(
        lambda window, function: bind(map_windows, window=window, function=function),
        st.one_of(st.integers(1, 5), st.integers(1, 9).map(partial(growing, first=2))),
        st.sampled_from(list(WINDOWS.values())),
    ),
    "repeat": st.integers(0, 3).map(lambda n: lambda source: partial(repeat, epochs_of(source), epochs=n)),
    "mix": st.builds(
        lambda other, weight, finished: lambda source: blended(source, other, weight, finished),
        st.lists(st.integers(-99, 99), max_size=5),
        st.integers(1, 4),
        st.sampled_from(["drop", "repeat", "stop"]),
    ),
    "tolerate": st.just(lambda source: pipe(source, partial(map_items, function=bad), partial(tolerate, limit=10**6))),
    "prefetch": st.integers(0, 3).map(lambda n: bind(prefetch, size=n)),
}


def reading_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=40)
@given(data=st.data(), values=NUMBERS)
def test_every_stage_resumes(name: str, data: st.DataObject, values: list[int]) -> None:
    check_resumes(data.draw(STAGES[name])(listed(values)), limit=30)


@given(values=NUMBERS, stages=st.lists(st.one_of(*STAGES.values()), max_size=5))
def test_compositions_resume(values: list[int], stages: list[Stage]) -> None:
    source = listed(values)
    for stage in stages:
        source = stage(source)
    check_resumes(source, limit=25)


@given(values=NUMBERS)
def test_endless_repeat_resumes(values: list[int]) -> None:
    source: Source[int] = partial(repeat, epochs_of(listed(values)))
    assert check_resumes(source, limit=25) == (25 if values else 0)


def test_the_check_finds_a_source_that_breaks_the_law() -> None:
    def forgetful(cursor: Cursor = None) -> Stream[int]:
        yield from ((x, 0) for x in range(3))

    def aliased(cursor: Cursor = None) -> Stream[int]:
        position = [0] if cursor is None else list(cursor)
        for x in range(position[0], 3):
            position[0] = x + 1
            yield x, position

    for source in (forgetful, aliased):
        with pytest.raises(AssertionError, match="going on from item 1"):
            check_resumes(source, limit=5)


@given(values=NUMBERS)
def test_each_and_keep(values: list[int]) -> None:
    source = pipe(listed(values), partial(map_items, function=negated), partial(filter_items, where=lambda x: x % 3 == 0))
    assert items(source) == [-x for x in values if x % 3 == 0]


def test_pipe_goes_from_left_to_right() -> None:
    assert items(pipe(listed([5]))) == [5]
    assert items(pipe(listed([5]), partial(map_items, function=negated), partial(map_items, function=lambda x: x + 1))) == [-4]


@given(values=NUMBERS, size=st.integers(1, 5))
def test_chunked_hands_over_chunks_in_order(values: list[int], size: int) -> None:
    seen: list[Sequence[int]] = []

    def function(chunk: Sequence[int]) -> list[int]:
        seen.append(list(chunk))
        return [x * x for x in chunk]

    assert items(pipe(listed(values), partial(map_chunks, size=size, function=function))) == [x * x for x in values]
    assert seen == chunks(values, size)


def test_chunked_refuses_a_function_that_changes_the_number() -> None:
    with pytest.raises(ValueError, match="zip"):
        items(pipe(listed([1, 2, 3]), partial(map_chunks, size=2, function=lambda chunk: chunk[:1])))


@pytest.mark.parametrize("function", WINDOWS.values(), ids=WINDOWS)
@given(values=NUMBERS, window=st.integers(1, 5))
def test_regroup_gives_all_outputs(
    function: Callable[[Sequence[int], int], Sequence[int]], values: list[int], window: int
) -> None:
    expected = [y for index, chunk in enumerate(chunks(values, window)) for y in function(chunk, index)]
    assert items(pipe(listed(values), partial(map_windows, window=window, function=function))) == expected


@given(values=NUMBERS, sizes=st.lists(st.integers(1, 5), min_size=13, max_size=13))
def test_regroup_by_windows_of_their_own_sizes(values: list[int], sizes: list[int]) -> None:
    bounds = [0, *accumulate(sizes)]
    expected = [(values[a:b], index) for index, (a, b) in enumerate(pairwise(bounds)) if values[a:b]]
    stage = partial(map_windows, window=lambda index: sizes[index], function=lambda window, index: [(window, index)])
    assert items(pipe(listed(values), stage)) == expected
    check_resumes(pipe(listed(values), stage), limit=12)


@given(values=NUMBERS, size=st.integers(1, 5))
def test_regroup_ends_a_window_early_where_it_may(values: list[int], size: int) -> None:
    expected: list[list[int]] = []
    for x in values:
        if not expected or len(expected[-1]) == size or x < sum(expected[-1]):
            expected.append([])
        expected[-1].append(x)
    falls: Callable[[Sequence[int], int], bool] = lambda window, following: following < sum(window)  # noqa: E731
    stage = partial(map_windows, window=size, function=lambda window, index: [(list(window), index)], ends=falls)
    assert items(pipe(listed(values), stage)) == [(window, index) for index, window in enumerate(expected)]
    check_resumes(pipe(listed(values), stage), limit=12)


def test_regroup_reads_again_only_the_window_that_it_stands_in() -> None:
    def source(cursor: Cursor = None) -> Stream[int]:
        for x, after in listed(range(6))(cursor):
            read.append(x)
            yield x, after

    read: list[int] = []
    paired: Source[int] = pipe(source, partial(map_windows, window=2, function=WINDOWS["reverse"]))
    for (_, cursor), expected in zip(list(paired(None)), [0, 2, 2, 4, 4, None], strict=True):
        read.clear()
        next(paired(cursor), None)
        assert read[:1] == ([] if expected is None else [expected])


@given(epochs=st.lists(st.lists(st.integers(), max_size=3), max_size=5), extra=st.integers(0, 2))
def test_repeat_gives_the_epochs_up_to_an_empty_one(epochs: list[list[int]], extra: int) -> None:
    number = max(len(epochs) - extra, 0)
    first_empty = next((i for i, epoch in enumerate(epochs[:number]) if not epoch), number)
    expected = [x for epoch in epochs[:first_empty] for x in epoch]
    assert items(partial(repeat, lambda epoch: listed(epochs[epoch]), epochs=number)) == expected


def test_repeat_without_end() -> None:
    endless: Source[int] = partial(repeat, lambda epoch: listed([epoch, 7]))
    assert [x for x, _ in islice(endless(None), 7)] == [0, 7, 1, 7, 2, 7, 3]
    assert items(partial(repeat, lambda epoch: listed([]))) == []
    assert items(partial(repeat, lambda epoch: listed([[1, 2], [3], []][epoch]))) == [1, 2, 3]


def tolerant(values: Sequence[int], limit: int) -> Source[int]:
    return pipe(listed([bad(x) for x in values]), partial(tolerate, limit=limit))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert {record.name for record in caplog.records} <= {"fnrecipe.data.stream"}
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def test_tolerate_of_nothing_raises_the_very_error(caplog: pytest.LogCaptureFixture) -> None:
    error = DataError("data.jsonl:3 (byte 7): expected text")
    stream = pipe(listed([1, error, 2]), partial(tolerate, limit=0))(None)
    assert next(stream) == (1, (1, 0))
    with pytest.raises(DataError) as caught:
        next(stream)
    assert caught.value is error
    assert not warnings(caplog)


def test_tolerate_counts_reports_and_then_raises(caplog: pytest.LogCaptureFixture) -> None:
    stream = tolerant([1, 5, 10, 2, 15, 3], 2)(None)
    assert [next(stream), next(stream)] == [(1, (1, 0)), (2, (4, 2))]
    assert warnings(caplog) == [
        "bad record skipped (1 of at most 2): data.jsonl:5: expected text",
        "bad record skipped (2 of at most 2): data.jsonl:10: expected text",
    ]
    with pytest.raises(DataError, match=r"^data\.jsonl:15: expected text\n  bad records skipped before it: 2$"):
        next(stream)


@given(values=NUMBERS)
def test_tolerate_gives_all_but_the_bad(values: list[int]) -> None:
    assert items(tolerant(values, len(values))) == [x for x in values if x % 5]


def test_the_count_of_bad_records_is_in_the_cursor(caplog: pytest.LogCaptureFixture) -> None:
    source = tolerant([1, 5, 2, 10, 3, 15, 4], 2)
    cursors = [json.loads(json.dumps(cursor)) for _, cursor in islice(source(None), 3)]
    assert [count for _, count in cursors] == [0, 1, 2]
    for k, cursor in enumerate(cursors):
        caplog.clear()
        stream = source(cursor)
        assert [x for x, _ in islice(stream, 2 - k)] == [2, 3][k:]
        assert [message[:36] for message in warnings(caplog)] == [
            f"bad record skipped ({n} of at most 2):"[:36] for n in (1, 2)
        ][k:]
        with pytest.raises(DataError, match=r"data\.jsonl:15: expected text\n  bad records skipped before it: 2"):
            next(stream)


@pytest.mark.parametrize("size", [0, 1, 3])
@settings(max_examples=8)
@given(values=NUMBERS)
def test_prefetch_gives_the_same(size: int, values: list[int]) -> None:
    assert list(prefetch(listed(values), size=size)) == list(listed(values)(None))
    assert list(prefetch(listed(values), 3, size=size)) == list(listed(values)(3))
    assert not reading_ahead()


def failing(cursor: Cursor = None) -> Stream[int]:
    yield 1, 1
    yield 2, 2
    raise ZeroDivisionError("at the third item")


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_prefetch_raises_an_error_at_its_place(size: int) -> None:
    stream = prefetch(failing, size=size)
    assert [next(stream), next(stream)] == [(1, 1), (2, 2)]
    with pytest.raises(ZeroDivisionError, match="at the third item") as caught:
        next(stream)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert list(stream) == []
    assert not reading_ahead()


def outcome(function: Callable[[], Any], results: list[Any]) -> None:
    try:
        results.append(function())
    except Exception as error:
        results.append(error)


def test_prefetch_raises_the_error_of_a_source_that_cannot_start() -> None:
    def absent(cursor: Cursor) -> Stream[int]:
        raise FileNotFoundError("gone")

    results: list[Any] = []
    consumer = threading.Thread(target=outcome, args=(lambda: next(prefetch(absent, size=1)), results), daemon=True)
    consumer.start()
    consumer.join(timeout=5)
    assert [type(result) for result in results] == [FileNotFoundError], "the consumer waits for ever"


class Counted:
    """An endless source that counts what it has given and notes that it was closed, by a call: it keeps its stream."""

    def __init__(self) -> None:
        self.given, self.closed = 0, False

    def __call__(self, cursor: Cursor = None) -> Stream[int]:
        self.stream = self.count()
        return self.stream

    def count(self) -> Stream[int]:
        try:
            while True:
                self.given += 1
                yield self.given, self.given
        finally:
            self.closed = True


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it never held")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_prefetch_runs_ahead_by_its_size_and_closes_while_it_waits(size: int) -> None:
    source = Counted()
    stream = prefetch(source, size=size)
    assert not reading_ahead()
    assert next(stream) == (1, 1)
    wait_until(lambda: source.given == 1 + size + 1)  # one used, a full queue, and the one that waits for a place
    assert len(reading_ahead()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert (source.given, source.closed) == (size + 2, True)
    assert not reading_ahead()


def abandon(stream: Iterator[Any]) -> None:
    for _ in stream:
        break


@pytest.mark.parametrize("size", [0, 1, 4])
def test_a_consumer_that_stops_early_leaves_no_thread(size: int) -> None:
    source = Counted()
    abandon(pipe(source, partial(prefetch, size=size), partial(map_items, function=negated))(None))
    gc.collect()
    assert not reading_ahead()
    assert source.closed


def test_a_consumer_that_fails_leaves_no_thread() -> None:
    def consume() -> None:
        for x, _ in prefetch(Counted(), size=2):
            _ = 1 // (3 - x)

    with pytest.raises(ZeroDivisionError):
        consume()
    gc.collect()
    assert not reading_ahead()


def test_prefetch_of_size_0_reads_nothing_ahead() -> None:
    source = Counted()
    stream = prefetch(source, size=0)
    assert [next(stream), next(stream)] == [(1, 1), (2, 2)]
    assert source.given == 2
    assert not reading_ahead()
    stream.close()  # type: ignore[attr-defined]
    assert source.closed


def odd(number: int) -> str:
    return "odd" if number % 2 else "large" if number > 9 else ""


def sifted(
    caplog: pytest.LogCaptureFixture, values: list[int], cursor: Cursor = None, **options: bool
) -> tuple[list[int], list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = items(pipe(listed(values), partial(sift, reason=odd, name="web", **options)), cursor)
    return found, [record.getMessage() for record in caplog.records]


def test_sift_warns_where_nothing_is_left_from_start_to_end(caplog: pytest.LogCaptureFixture) -> None:
    assert sifted(caplog, [1, 2, 3, 4, 20]) == ([2, 4], [])
    assert sifted(caplog, [1, 20, 3]) == ([], ["web: expected documents to use, found none but 2 odd, 1 large"])
    assert sifted(caplog, []) == ([], ["web: expected documents to use, found none"])
    assert sifted(caplog, [], needed=False) == ([], [])
    assert sifted(caplog, [2, 1, 3], 1) == ([], [])
