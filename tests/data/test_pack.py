from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Tokens, growing, pack, split
from fnrecipe.data.pack import Row, best_fit

Prediction = tuple[int, int]


def document(ids: Sequence[int], num_bytes: int = 0, source: int = 0) -> Tokens:
    return Tokens(np.array(ids, np.int32), num_bytes, source)


def numbered(sizes: Sequence[int]) -> list[Tokens]:
    """Documents of `sizes` predictions, no id twice, so that a prediction that crosses documents shows."""
    bounds = np.cumsum([0, *(size + 1 for size in sizes)])
    return [document(range(start, stop), 3 * int(stop - start), i) for i, (start, stop) in enumerate(pairwise(bounds))]


def predictions(piece: Tokens) -> list[Prediction]:
    return list(pairwise(piece.ids.tolist()))


DOCUMENTS = st.builds(document, st.lists(st.integers(0, 5), max_size=40), st.integers(0, 500), st.integers(0, 9))
LENGTHS = st.integers(1, 12)


@given(doc=DOCUMENTS, length=LENGTHS)
def test_split_keeps_every_prediction_once_and_in_order(doc: Tokens, length: int) -> None:
    pieces = split(doc, length)
    assert [pair for piece in pieces for pair in predictions(piece)] == predictions(doc)


@given(doc=DOCUMENTS, length=LENGTHS)
def test_split_cuts_only_what_is_too_long(doc: Tokens, length: int) -> None:
    *full, last = [len(predictions(piece)) for piece in split(doc, length)] or [1]
    assert full == [length] * len(full)
    assert 1 <= last <= length


@given(doc=DOCUMENTS.filter(lambda doc: len(doc.ids) > 1), length=LENGTHS)
def test_split_deals_the_bytes_out_exactly_and_in_proportion(doc: Tokens, length: int) -> None:
    pieces = split(doc, length)
    assert sum(piece.num_bytes for piece in pieces) == doc.num_bytes
    for piece in pieces:
        share = doc.num_bytes * len(predictions(piece)) / len(predictions(doc))
        assert abs(piece.num_bytes - share) < 1


@given(doc=DOCUMENTS, length=LENGTHS)
def test_split_keeps_the_source(doc: Tokens, length: int) -> None:
    assert {piece.source for piece in split(doc, length)} <= {doc.source}


@pytest.mark.parametrize("ids", [[], [7]])
def test_split_of_a_document_without_predictions(ids: list[int]) -> None:
    assert split(document(ids), 4) == []


def slow_best_fit(sizes: Sequence[int], length: int, limit: int | None = None) -> list[list[int]]:
    """The largest first, each into the fullest row that has room; of equally full ones the one that grew last."""
    rows: list[list[int]] = []
    by_age: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        short = [row for row in by_age if limit is None or len(row) < limit]
        room = [row for row in short if sum(sizes[i] for i in row) + sizes[index] <= length]
        row = max(reversed(room), key=lambda row: sum(sizes[i] for i in row), default=None)
        if row is None:
            rows.append(row := [])
        else:
            by_age = [other for other in by_age if other is not row]
        row.append(index)
        by_age.append(row)
    return rows


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int, int | None]:
    length = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, length), max_size=60)), length, draw(st.none() | st.integers(1, 6))


@given(packings())
def test_best_fit_puts_each_index_into_one_row_that_has_room(packing: tuple[list[int], int, int | None]) -> None:
    sizes, length, limit = packing
    rows = best_fit(sizes, length, limit)
    assert all(len(row) <= (limit or length) for row in rows)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[index] for index in row) <= length for row in rows)


@given(packings())
def test_best_fit_equals_the_slow_model(packing: tuple[list[int], int, int | None]) -> None:
    assert best_fit(*packing) == slow_best_fit(*packing)


def test_best_fit_of_many_equals_the_slow_model() -> None:
    sizes = np.random.Generator(np.random.Philox(1)).integers(1, 101, 300).tolist()
    assert best_fit(sizes, 100) == slow_best_fit(sizes, 100)


def row_predictions(row: Row) -> list[Prediction]:
    return [pair for piece in row for pair in predictions(piece)]


@given(sizes=st.lists(st.integers(0, 30), max_size=20), length=LENGTHS)
def test_pack_keeps_every_prediction_once_and_crosses_no_document(sizes: list[int], length: int) -> None:
    documents = numbered(sizes)
    rows = pack(documents, 0, length=length, key=(1,))
    expected = Counter(pair for document in documents for pair in predictions(document))
    assert Counter(pair for row in rows for pair in row_predictions(row)) == expected
    assert all(1 <= len(row_predictions(row)) <= length for row in rows)


@given(sizes=st.lists(st.integers(1, 30), max_size=20), length=LENGTHS)
def test_pack_loses_no_byte(sizes: list[int], length: int) -> None:
    documents = numbered(sizes)
    rows = pack(documents, 3, length=length, key=())
    assert sum(piece.num_bytes for row in rows for piece in row) == sum(document.num_bytes for document in documents)


@given(sizes=st.lists(st.integers(0, 30), max_size=20), length=LENGTHS)
def test_pack_keeps_the_source_of_every_piece(sizes: list[int], length: int) -> None:
    source_of = {int(token): number for number, doc in enumerate(numbered(sizes)) for token in doc.ids}
    for row in pack(numbered(sizes), 0, length=length, key=None):
        assert [piece.source for piece in row] == [source_of[int(piece.ids[0])] for piece in row]


@given(sizes=st.lists(st.integers(0, 30), max_size=20), length=LENGTHS)
def test_without_a_key_rows_stay_as_they_were_packed(sizes: list[int], length: int) -> None:
    pieces = [predictions(piece) for doc in numbered(sizes) for piece in split(doc, length)]
    expected = [[pieces[i] for i in row] for row in slow_best_fit([len(piece) for piece in pieces], length)]
    for index in (0, 5):
        rows = pack(numbered(sizes), index, length=length, key=None)
        assert [[predictions(piece) for piece in row] for row in rows] == expected


def test_a_key_shuffles_the_rows_of_a_window() -> None:
    documents = numbered([5 + i % 7 for i in range(60)])
    plain, mixed = (contents(pack(documents, 0, length=16, key=key)) for key in (None, (2, 0)))
    assert plain != mixed
    assert sorted(plain) == sorted(mixed)


def contents(rows: Sequence[Row]) -> list[tuple[Prediction, ...]]:
    return [tuple(row_predictions(row)) for row in rows]


def test_the_order_of_rows_depends_on_key_and_index() -> None:
    documents = numbered([5 + i % 7 for i in range(60)])
    calls = [(0, (2, 0)), (1, (2, 0)), (0, (2, 1)), (0, (3, 0))]
    orders = [contents(pack(documents, index, length=16, key=key)) for index, key in calls]
    assert len({tuple(order) for order in orders}) == len(calls)
    assert len({frozenset(order) for order in orders}) == 1
    assert orders[0] == contents(pack(documents, 0, length=16, key=(2, 0)))


def test_growing_windows() -> None:
    assert [growing(512)(index) for index in range(7)] == [32, 64, 128, 256, 512, 512, 512]
    assert [growing(100, first=7)(index) for index in (0, 3, 4, 5, 10**9)] == [7, 56, 100, 100, 100]
    assert growing(3)(0) == 3


def test_padding_of_windows_of_512_documents_is_below_half_a_percent() -> None:
    median, mean, length, windows = 545, 899, 2048, 20
    random = np.random.Generator(np.random.Philox(2))
    sizes = random.lognormal(np.log(median), np.sqrt(2 * np.log(mean / median)), (windows, 512))
    used = rows = 0
    for window in np.maximum(sizes.astype(int), 1):
        documents = [Tokens(np.zeros(size + 1, np.int32), 0) for size in window]
        rows += len(pack(documents, 0, length=length, key=(0,)))
        used += int(window.sum())
    assert 0 <= 1 - used / (rows * length) < 0.005


EPOCHS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), max_size=6)


@given(epochs=EPOCHS, length=LENGTHS, key=st.sampled_from([None, (3,)]))
def test_rows_hold_the_epochs_of_a_window_one_after_the_other(epochs: list[list[int]], length: int, key: Any) -> None:
    documents = [attrs.evolve(doc, epoch=number, source=0) for number, sizes in enumerate(epochs) for doc in numbered(sizes)]
    rows = pack(documents, 0, length=length, key=key)
    first_last = [(min(piece.epoch for piece in row), max(piece.epoch for piece in row)) for row in rows]
    assert all(last <= first for (_, last), (first, _) in pairwise(first_last))
    assert all(sum(len(piece.ids) - 1 for piece in row) <= length for row in rows)
    assert sum(len(piece.ids) - 1 for row in rows for piece in row) == sum(chain(*epochs))


def test_a_row_that_one_epoch_leaves_open_is_filled_by_the_next() -> None:
    documents = [attrs.evolve(doc, epoch=number, source=0) for number in range(40) for doc in numbered([3, 4])]
    rows = pack(documents, 0, length=100, key=(1,))
    assert [sum(len(piece.ids) - 1 for piece in row) for row in rows] == [98, 98, 84]


@given(sizes=st.lists(st.integers(1, 12), max_size=20), limit=st.integers(1, 4), epochs=st.integers(1, 3))
def test_no_row_holds_more_pieces_than_the_limit_not_even_one_that_two_epochs_share(
    sizes: list[int], limit: int, epochs: int
) -> None:
    documents = [attrs.evolve(document, epoch=epoch) for epoch in range(epochs) for document in numbered(sizes)]
    rows = pack(documents, 0, length=16, limit=limit, key=(1,))
    assert all(1 <= len(row) <= limit for row in rows)
    expected = Counter(pair for document in documents for pair in predictions(document))
    assert Counter(pair for row in rows for pair in row_predictions(row)) == expected
