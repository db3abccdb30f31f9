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
from numpy.typing import NDArray

from fnrecipe.data import Batch, Cursor, Place, Source, Tokens, collate, cumulative_lengths, deal
from fnrecipe.data.batch import join
from fnrecipe.data.pack import Row
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


def slow_bounds(segments: NDArray[np.int64]) -> list[int]:
    """Where a piece or padding begins: at the start of a row, and wherever the number changes."""
    return [
        i * len(row) + j for i, row in enumerate(segments.tolist()) for j in range(len(row)) if j == 0 or row[j] != row[j - 1]
    ]


@given(rows=st.lists(rows_of(LENGTH), max_size=4), spare=st.integers(1, 9))
def test_cumulative_lengths_equal_the_slow_model(rows: list[Row], spare: int) -> None:
    segments = collate(rows, LENGTH).segments
    expected = slow_bounds(segments)
    size = len(expected) + spare
    bounds = cumulative_lengths(segments, size)
    assert (bounds.dtype, bounds.shape) == (np.int32, (size,))
    assert bounds.tolist() == [*expected, *[segments.size] * spare]
    assert (bounds[0], bounds[-1]) == (0, len(rows) * LENGTH)


def test_cumulative_lengths_in_full() -> None:
    rows = [[piece([9, 1, 2]), piece([9, 3])], [], [piece([4, 5, 6, 7, 8])], [piece([4, 5, 6, 7, 8])]]
    assert cumulative_lengths(collate(rows, 4).segments, 9).tolist() == [0, 2, 3, 4, 8, 12, 16, 16, 16]


@pytest.mark.parametrize("size", [0, 1, 5, 6])
def test_more_pieces_than_cumulative_lengths_have_room_for(size: int) -> None:
    segments = collate([[piece([9, 1, 2]), piece([9, 3])], [], [piece([4, 5])]], 4).segments
    with pytest.raises(UsageError, match=rf"^cumulative_lengths: expected at most {size - 1} pieces in a batch, found 6$"):
        cumulative_lengths(segments, size)
    assert cumulative_lengths(segments, 7).tolist() == [0, 2, 3, 4, 8, 9, 12]


def lane(number: int, num_rows: int) -> Source[Row]:
    """Rows that are each recognised by their ids: lane, row."""
    return listed([[piece([1000 * number + 10 * i, 1, 2]), piece([1000 * number + 10 * i + 5, 3])] for i in range(num_rows)])


def dealt(lanes: Sequence[Source[Row]], rank: int, world_size: int) -> Source[Batch]:
    return partial(deal, lanes, rows_per_lane=ROWS_PER_LANE, length=LENGTH, place=Place(rank, world_size))


LANE_SIZES = {
    "even": (4,) * 8,
    "uneven": (5, 0, 3, 9, 1, 2, 7, 4),
    "one": (0, 0, 0, 0, 0, 5, 0, 0),
    "the first half ends early": (1, 1, 1, 1, 8, 8, 8, 8),
    "none": (0,) * 8,
}


def gang(lanes: Sequence[Source[Row]], world_size: int, cursor: Cursor = None) -> list[tuple[Any, Cursor]]:
    """The global batches of all ranks and their joint cursors, up to the first batch that is padding on all ranks."""
    streams = [dealt(lanes, rank, world_size)(cursor) for rank in range(world_size)]
    steps = []
    while entries := list(filter(None, (next(stream, None) for stream in streams))):
        batch = join([part for part, _ in entries])
        assert len(entries) == world_size
        if not batch.mask.any():
            assert world_size > 1
            break
        steps.append((plain(batch), json.loads(json.dumps({lane: at for _, after in entries for lane, at in after.items()}))))
    return steps


def batches(steps: Sequence[tuple[Any, Cursor]]) -> list[Any]:
    return [batch for batch, _ in steps]


def slow_global(lanes: Sequence[Source[Row]]) -> list[Any]:
    """Step by step, lane by lane: the next rows of the lane, or empty ones."""
    rows = [items(lane) for lane in lanes]
    num_steps = -(-max(map(len, rows)) // ROWS_PER_LANE)
    at = [range(step * ROWS_PER_LANE, (step + 1) * ROWS_PER_LANE) for step in range(num_steps)]
    return [slow_batch([mine[i] if i < len(mine) else [] for mine in rows for i in step], LENGTH) for step in at]


@pytest.mark.parametrize("sizes", LANE_SIZES.values(), ids=LANE_SIZES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_global_batch_is_the_same_for_every_world_size(sizes: Sequence[int], world_size: int) -> None:
    lanes = [lane(number, size) for number, size in enumerate(sizes)]
    assert batches(gang(lanes, world_size)) == slow_global(lanes)


@pytest.mark.parametrize("sizes", LANE_SIZES.values(), ids=LANE_SIZES)
@pytest.mark.parametrize("after", WORLD_SIZES)
@pytest.mark.parametrize("before", WORLD_SIZES)
def test_joint_cursors_go_on_at_any_world_size(sizes: Sequence[int], before: int, after: int) -> None:
    lanes = [lane(number, size) for number, size in enumerate(sizes)]
    steps = gang(lanes, before)
    for k, (_, cursor) in enumerate(steps, 1):
        assert batches(gang(lanes, after, cursor)) == batches(steps[k:]), f"after step {k}"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_resumes(world_size: int) -> None:
    lanes = [lane(number, size) for number, size in enumerate(LANE_SIZES["uneven"])]
    for rank in range(world_size):
        check_resumes(dealt(lanes, rank, world_size), limit=20)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_that_run_out_go_on_with_padding(world_size: int) -> None:
    lanes = [lane(number, size) for number, size in enumerate(LANE_SIZES["the first half ends early"])]
    *_, (batch, cursor) = islice(dealt(lanes, 0, world_size)(None), 50)
    mine = len(lanes) // world_size
    assert plain(batch) == slow_batch([[]] * mine * ROWS_PER_LANE, LENGTH)
    assert cursor == {str(number): LANE_SIZES["the first half ends early"][number] for number in range(mine)}


def test_a_single_rank_ends_with_its_last_lane() -> None:
    assert len(items(dealt([lane(0, 1), lane(1, 7)], 0, 1))) == 4
    assert items(dealt([lane(0, 0), lane(1, 0)], 0, 1)) == []


@given(sizes=st.lists(st.integers(0, 6), min_size=8, max_size=8), world_size=st.sampled_from(WORLD_SIZES))
def test_every_prediction_once(sizes: list[int], world_size: int) -> None:
    lanes = [lane(number, size) for number, size in enumerate(sizes)]
    found = [
        (token, target)
        for batch in batches(gang(lanes, world_size))
        for tokens, targets, mask in zip(batch["tokens"][1], batch["targets"][1], batch["mask"][1], strict=True)
        for token, target, real in zip(tokens, targets, mask, strict=True)
        if real
    ]
    expected = [pair for rows in map(items, lanes) for row in rows for piece in row for pair in pairwise(piece.ids.tolist())]
    assert sorted(found) == sorted(expected)


def test_a_rank_holds_the_cursors_of_its_own_lanes() -> None:
    lanes = [lane(number, 4) for number in range(8)]
    [(_, cursor)] = islice(dealt(lanes, 1, 4)(None), 1)
    assert cursor == {"2": 2, "3": 2}


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (1, 2)])
def test_the_number_of_lanes_cannot_change(before: int, after: int) -> None:
    *_, (_, cursor) = gang([lane(number, 4) for number in range(before)], 1)
    with pytest.raises(UsageError, match=rf"dataset\.num_lanes: expected .*, found {after} lanes"):
        items(dealt([lane(number, 4) for number in range(after)], 0, 1), cursor)


def test_a_rank_reads_no_other_lane() -> None:
    def forbidden(cursor: Cursor) -> Any:
        raise AssertionError("not this rank's")

    lanes = [forbidden, forbidden, lane(2, 3), lane(3, 1)]
    assert len(take(dealt(lanes, 1, 2), None, 9)) == 9


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_lanes_that_cannot_be_shared_out(world_size: int) -> None:
    expected = rf"^dataset\.num_lanes: expected a multiple of the world size {world_size}, found 8$"
    with pytest.raises(UsageError, match=expected):
        next(dealt([lane(number, 4) for number in range(8)], 0, world_size)(None))
