from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import (
    Batch,
    Cursor,
    LaneAssignment,
    Source,
    Tokens,
    batch_lanes,
    collate,
    endless,
    joint,
    readers_for,
)
from fnrecipe.data.pack import Row
from fnrecipe.data.rows import join
from fnrecipe.errors import UsageError
from tests.data.laws import check_resumes, items, listed, plain, take

WORLD_SIZES = [1, 2, 4, 8]
ROWS_PER_LANE = 2
LENGTH = 6

PADDING = {"tokens": 0, "targets": 0, "segments": -1, "positions": 0, "sources": -1, "mask": False}
DTYPES = dict.fromkeys([*PADDING, "num_bytes"], "int64") | {"mask": "bool"}


def piece(ids: Sequence[int], num_bytes: int = 1, source: int = 0) -> Tokens:
    return Tokens(np.array(ids, np.int32), num_bytes, source)


def slow_row(row: Row, length: int) -> dict[str, Any]:
    """One row, column by column."""
    columns = [
        dict(zip(PADDING, (token, target, segment, position, piece.source, True), strict=True))
        for segment, piece in enumerate(row)
        for position, (token, target) in enumerate(pairwise(piece.ids.tolist()))
    ]
    columns += [PADDING] * (length - len(columns))
    arrays = {name: [column[name] for column in columns] for name in PADDING}
    return arrays | {"num_bytes": sum(piece.num_bytes for piece in row)}


def slow_batch(rows: Sequence[Row], length: int) -> dict[str, Any]:
    """What `plain` makes of the batch of these rows."""
    slow_rows = [slow_row(row, length) for row in rows]
    return {name: [dtype, [row[name] for row in slow_rows]] for name, dtype in DTYPES.items()}


@st.composite
def rows_of(draw: st.DrawFn, length: int) -> list[Tokens]:
    sizes = draw(st.lists(st.integers(1, length), max_size=length))
    while sum(sizes) > length:
        sizes.pop()
    ids = st.integers(0, 2**31 - 1)
    small = st.integers(0, 99)
    return [piece(draw(st.lists(ids, min_size=n + 1, max_size=n + 1)), draw(small), draw(small)) for n in sizes]


@given(rows=st.lists(rows_of(LENGTH), max_size=4))
def test_collate_equals_the_slow_model(rows: list[list[Tokens]]) -> None:
    assert plain(collate(rows, LENGTH)) == slow_batch(rows, LENGTH)


def test_collate_in_full() -> None:
    batch = collate([[piece([9, 1, 2], 5, 3), piece([9, 3], 2)], [], [piece([4, 5, 6, 7, 8])]], 4)
    assert batch.tokens.tolist() == [[9, 1, 9, 0], [0, 0, 0, 0], [4, 5, 6, 7]]
    assert batch.targets.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [5, 6, 7, 8]]
    assert batch.segments.tolist() == [[0, 0, 1, -1], [-1, -1, -1, -1], [0, 0, 0, 0]]
    assert batch.sources.tolist() == [[3, 3, 0, -1], [-1, -1, -1, -1], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert batch.mask.astype(int).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.num_bytes.tolist() == [7, 0, 1]


def test_collate_of_no_rows() -> None:
    assert collate([], 4).tokens.shape == (0, 4)


@given(parts=st.lists(st.lists(rows_of(LENGTH), max_size=3), min_size=1, max_size=4))
def test_join_puts_rows_one_after_the_other(parts: list[list[Row]]) -> None:
    joined = join([collate(rows, LENGTH) for rows in parts])
    assert plain(joined) == slow_batch([row for rows in parts for row in rows], LENGTH)


NUM_LANES = 8


def reader(number: int, num_rows: int) -> Source[Row]:
    """Rows that are each recognised by their ids: reader, row."""
    return listed([[piece([1000 * number + 10 * i, 1, 2]), piece([1000 * number + 10 * i + 5, 3])] for i in range(num_rows)])


def dealt(readers: Sequence[Source[Row]], rank: int, world_size: int) -> Source[Batch]:
    sizes = {"num_lanes": NUM_LANES, "rows_per_lane": ROWS_PER_LANE}
    made = partial(batch_lanes, collate=partial(collate, length=LENGTH), padding=(), **sizes)
    return partial(made, readers, assignment=LaneAssignment(rank, world_size))


READER_SIZES = {
    "even": (4,) * 8,
    "uneven": (5, 0, 3, 9, 1, 2, 7, 4),
    "one has rows": (0, 0, 0, 0, 0, 5, 0, 0),
    "the first half ends early": (1, 1, 1, 1, 8, 8, 8, 8),
    "none": (0,) * 8,
    "four": (9, 33, 0, 16),
    "two": (21, 50),
    "one": (75,),
}


def gang(readers: Sequence[Source[Row]], world_size: int, cursor: Cursor = None) -> list[tuple[Any, Cursor]]:
    """The global batches of all ranks and their joint cursors, until all of their streams have ended."""
    streams = [endless(dealt(readers, rank, world_size), cursor) for rank in range(world_size)]
    padding, steps = collate([[]] * (NUM_LANES * ROWS_PER_LANE // world_size), LENGTH), []
    for entries in zip(*streams, strict=True):
        if all(part is None for part, _ in entries):
            break
        batch = join([part or padding for part, _ in entries])
        steps.append((plain(batch), json.loads(json.dumps(joint(cursor, [after for _, after in entries])))))
    return steps


def batches(steps: Sequence[tuple[Any, Cursor]]) -> list[Any]:
    return [batch for batch, _ in steps]


def slow_global(readers: Sequence[Source[Row]]) -> list[Any]:
    """Step by step, reader by reader: the next rows of the reader, or empty ones."""
    rows, share = [items(reader) for reader in readers], NUM_LANES * ROWS_PER_LANE // len(readers)
    num_steps = -(-max(map(len, rows)) // share)
    at = [range(step * share, (step + 1) * share) for step in range(num_steps)]
    return [slow_batch([mine[i] if i < len(mine) else [] for mine in rows for i in step], LENGTH) for step in at]


def readers_of(sizes: Sequence[int]) -> list[Source[Row]]:
    return [reader(number, size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", READER_SIZES.values(), ids=READER_SIZES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_global_batch_is_the_same_for_every_world_size(sizes: Sequence[int], world_size: int) -> None:
    readers = readers_of(sizes)
    assert batches(gang(readers, world_size)) == slow_global(readers)


@pytest.mark.parametrize("sizes", READER_SIZES.values(), ids=READER_SIZES)
@pytest.mark.parametrize("after", WORLD_SIZES)
@pytest.mark.parametrize("before", WORLD_SIZES)
def test_joint_cursors_go_on_at_any_world_size(sizes: Sequence[int], before: int, after: int) -> None:
    readers = readers_of(sizes)
    steps = gang(readers, before)
    for k, (_, cursor) in enumerate(steps, 1):
        assert batches(gang(readers, after, cursor)) == batches(steps[k:]), f"after step {k}"


@pytest.mark.parametrize("sizes", ["uneven", "two", "one"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_resumes(sizes: str, world_size: int) -> None:
    readers = readers_of(READER_SIZES[sizes])
    for rank in range(world_size):
        check_resumes(dealt(readers, rank, world_size), limit=20)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_ends_with_its_own_readers(world_size: int) -> None:
    sizes = READER_SIZES["the first half ends early"]
    *_, (_, cursor) = islice(dealt(readers_of(sizes), 0, world_size)(None), 50)
    mine = len(sizes) // world_size
    assert cursor == {"law": 3, **{str(number): sizes[number] if number < mine else None for number in range(8)}}
    assert items(dealt(readers_of(sizes), 0, world_size), cursor) == []


def test_a_rank_without_rows_goes_on_while_a_reader_that_it_shares_has_some() -> None:
    readers = readers_of([ROWS_PER_LANE * NUM_LANES + 1])  # the second batch has one row, of the first lane
    (_, first), (batch, second) = dealt(readers, 3, 4)(None)
    assert plain(batch) == slow_batch([[]] * (2 * ROWS_PER_LANE), LENGTH)
    assert (first["0"], second["0"]) == (ROWS_PER_LANE * NUM_LANES, ROWS_PER_LANE * NUM_LANES + 1)


def test_a_single_rank_ends_with_its_last_reader() -> None:
    assert len(items(dealt(readers_of([1, 17]), 0, 1))) == 3
    assert items(dealt(readers_of([0, 0]), 0, 1)) == []


@pytest.mark.parametrize(
    ("start", "cursors", "expected"),
    [
        (None, [3, 3], 3),
        (3, [4, 4, 4], 4),
        (3, [3, 3], 3),
        (None, [None, {"a": 1, "b": None}], {"a": 1, "b": None}),
        ({"a": 1, "b": 2}, [{"a": 5, "b": 2}, {"a": 1, "b": 7}, {"a": 1, "b": 2}], {"a": 5, "b": 7}),
        ({"a": 1, "b": 2}, [{"a": 5, "b": 2}, {"a": 5, "b": 9}], {"a": 5, "b": 9}),
    ],
)
def test_joint_takes_what_each_process_has_moved_on(start: Cursor, cursors: list[Cursor], expected: Cursor) -> None:
    assert joint(start, cursors) == joint(start, cursors[::-1]) == expected


@pytest.mark.parametrize(
    ("cursors", "error"),
    [
        ([4, 5], "stream: expected the same cursor of all processes, or mappings, found 4 and 5"),
        ([{"a": 2}, {"a": 3}], "stream: expected the same cursor of all processes that move on 'a', found 2 and 3"),
    ],
)
def test_cursors_that_cannot_be_one_are_told(cursors: list[Cursor], error: str) -> None:
    with pytest.raises(UsageError) as caught:
        joint(None, cursors)
    assert str(caught.value) == error


@given(
    sizes=st.sampled_from([1, 2, 4, 8]).flatmap(lambda n: st.lists(st.integers(0, 20), min_size=n, max_size=n)),
    world_size=st.sampled_from(WORLD_SIZES),
)
def test_every_prediction_once(sizes: list[int], world_size: int) -> None:
    readers = readers_of(sizes)
    found = [
        (token, target)
        for batch in batches(gang(readers, world_size))
        for tokens, targets, mask in zip(batch["tokens"][1], batch["targets"][1], batch["mask"][1], strict=True)
        for token, target, real in zip(tokens, targets, mask, strict=True)
        if real
    ]
    rows = [row for reader in readers for row in items(reader)]
    assert sorted(found) == sorted(pair for row in rows for piece in row for pair in pairwise(piece.ids.tolist()))


def test_a_rank_moves_on_the_cursors_of_the_readers_of_its_own_lanes() -> None:
    [(_, cursor)] = islice(dealt(readers_of([4] * 4), 1, 4)(None), 1)
    assert cursor == {"law": 3, "0": None, "1": 4, "2": None, "3": None}
    [(_, cursor)] = islice(dealt(readers_of([40] * 2), 2, 4)({"law": 3, "0": 1, "1": 3}), 1)
    assert cursor == {"law": 3, "0": 1, "1": 11}


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (1, 2)])
def test_the_number_of_readers_cannot_change(before: int, after: int) -> None:
    *_, (_, cursor) = gang(readers_of([40] * before), 1)
    with pytest.raises(UsageError, match=rf"dataset\.num_readers: expected .*, found {after} of them"):
        items(dealt(readers_of([40] * after), 0, 1), cursor)


@pytest.mark.parametrize(
    ("cursor", "found"), [({"0": 3, "1": 5}, "one before there were versions"), ({"law": 1, "0": 3}, "1"), ({"law": 4}, "4")]
)
def test_a_place_in_another_order_of_the_data_is_refused(cursor: Cursor, found: str) -> None:
    with pytest.raises(UsageError, match=rf"expected version 3 of the order of the data, found {found}$"):
        items(dealt(readers_of([4]), 0, 1), cursor)


def test_a_rank_reads_for_no_other_lanes() -> None:
    def forbidden(cursor: Cursor) -> Any:
        raise AssertionError("not this rank's")

    rows = NUM_LANES // 2 * ROWS_PER_LANE
    assert len(take(dealt([forbidden, reader(1, 9 * rows)], 1, 2), None, 10)) == 9


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_lanes_that_cannot_be_shared_out(world_size: int) -> None:
    expected = rf"^dataset\.num_lanes: expected a multiple of the world size {world_size}, found 8$"
    with pytest.raises(UsageError, match=expected):
        next(dealt(readers_of([4] * 8), 0, world_size)(None))


@pytest.mark.parametrize(
    ("mebibytes", "num_lanes", "expected"),
    [(0, 8, 1), (127, 8, 1), (128, 8, 2), (255, 8, 2), (256, 8, 4), (10**6, 8, 8), (10**6, 1, 1), (200, 6, 3), (70, 1024, 1)],
)
def test_a_reader_has_64_mebibytes_or_is_the_only_one(mebibytes: int, num_lanes: int, expected: int) -> None:
    assert readers_for(mebibytes << 20, num_lanes) == expected
