from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import attrs
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fnrecipe.data import Source, Tokens, collate, concat, split
from fnrecipe.data.pack import Row
from tests.data.laws import check_resumes, items, listed

LENGTHS = st.integers(1, 9)
SIZES = st.lists(st.integers(1, 30), max_size=12)


@attrs.frozen
class SlowRow:
    """A row as fairseq2's `pack` gives it: its tokens and the lengths of the pieces they are made of."""

    tokens: list[int]
    seq_lens: list[int]


def slow_pack(documents: Sequence[Sequence[int]], length: int) -> list[SlowRow]:
    """fairseq2's rule with a capacity of length + 1 and a max_seq_len of length; the last row may be partial."""
    waiting, rows, row = [list(ids) for ids in documents], [], SlowRow([], [])
    while waiting:
        ids = waiting.pop(0)
        if not ids:
            continue
        fill = min(len(ids), length + 1 - len(row.tokens), length)
        row.tokens.extend(ids[:fill])
        row.seq_lens.append(fill)
        full = len(row.tokens) == length + 1
        if fill < len(ids):
            waiting.insert(0, ids[fill - 1 if full else fill :])
        if full:
            rows.append(row)
            row = SlowRow([], [])
    return [*rows, row] if len(row.tokens) > 1 else rows


def columns(row: SlowRow, length: int) -> dict[str, list[int]]:
    """The row as inputs and targets, one token apart, padded to the length."""
    *lengths, last = row.seq_lens
    numbers = [(segment, i) for segment, n in enumerate([*lengths, last - 1]) for i in range(n)]
    padding = length + 1 - len(row.tokens)
    return {
        "tokens": row.tokens[:-1] + [0] * padding,
        "targets": row.tokens[1:] + [0] * padding,
        "segments": [segment for segment, _ in numbers] + [-1] * padding,
        "positions": [position for _, position in numbers] + [0] * padding,
    }


def numbered(sizes: Sequence[int]) -> list[Tokens]:
    """Documents of so many tokens, no id twice; the source is the document's number. A byte needs a prediction."""
    bounds = np.cumsum([1, *sizes])
    return [
        Tokens(np.arange(start, stop, dtype=np.int32), 7 * int(stop - start - 1) if stop > start else 0, number)
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]


def rows_of(sizes: Sequence[int], length: int) -> Source[Row]:
    return partial(concat, listed(numbered(sizes)), length=length)


def found(rows: Sequence[Row], length: int) -> list[dict[str, list[int]]]:
    batch = collate(rows, length)
    names = ("tokens", "targets", "segments", "positions")
    return [{name: getattr(batch, name)[i].tolist() for name in names} for i in range(len(rows))]


@given(sizes=st.lists(st.integers(0, 30), max_size=12), length=LENGTHS)
@example(sizes=[10], length=3)
def test_rows_are_those_of_fairseq2(sizes: list[int], length: int) -> None:
    slow = slow_pack([document.ids.tolist() for document in numbered(sizes)], length)
    assert found(items(rows_of(sizes, length)), length) == [columns(row, length) for row in slow]


ENDS = {
    "no documents": [],
    "only empty documents": [0, 0],
    "one token": [1],
    "one-token documents": [1] * 23,
    "of exactly a row's length": [8, 8, 8],
    "of a row's tokens": [9, 9, 9],
    "one more than a row": [10, 10],
    "of five rows": [40],
    "of five rows and one token": [41, 1],
    "a full row, then one token": [9, 1],
    "one token at the end of a row": [8, 20],
    "one token, then exactly a row": [1, 8],
    "an empty document between": [5, 0, 7],
}


@pytest.mark.parametrize("sizes", ENDS.values(), ids=ENDS)
def test_rows_at_the_ends(sizes: Sequence[int]) -> None:
    slow = slow_pack([document.ids.tolist() for document in numbered(sizes)], 8)
    assert found(items(rows_of(sizes, 8)), 8) == [columns(row, 8) for row in slow]
    check_resumes(rows_of(sizes, 8), limit=30)


def test_rows_written_out() -> None:
    rows = items(rows_of([3, 1, 5, 2], 4))  # 1 2 3 | 4 | 5 6 7 8 9 | 10 11
    assert [[piece.ids.tolist() for piece in row] for row in rows] == [
        [[1, 2, 3, 4], [4, 5]],  # 5 is the last token of the row: a target here, an input in the next
        [[5, 6, 7, 8, 9]],
        [[10, 11]],
    ]


def test_a_long_document_repeats_one_token_a_row() -> None:
    [first, second, third] = found(items(rows_of([13], 4)), 4)
    assert (first["tokens"], first["targets"]) == ([1, 2, 3, 4], [2, 3, 4, 5])
    assert (second["tokens"], second["targets"]) == ([5, 6, 7, 8], [6, 7, 8, 9])
    assert (third["tokens"], third["targets"]) == ([9, 10, 11, 12], [10, 11, 12, 13])
    assert {tuple(row["positions"]) for row in (first, second, third)} == {(0, 1, 2, 3)}


@given(sizes=SIZES, length=LENGTHS)
def test_every_row_but_the_last_is_full(sizes: list[int], length: int) -> None:
    batch = collate(items(rows_of(sizes, length)), length)
    assert batch.mask[:-1].all()
    assert batch.mask.any(1).all()


@given(sizes=SIZES, length=LENGTHS)
def test_each_token_is_predicted_once_but_the_first_of_a_row(sizes: list[int], length: int) -> None:
    rows = items(rows_of(sizes, length))
    targets = [target for row in found(rows, length) for target in row["targets"] if target]
    starts = {int(row[0].ids[0]) for row in rows}
    assert sorted(targets) == sorted(set(targets))
    lost = set(range(1, sum(sizes) + 1)) - set(targets)
    assert lost - starts <= {sum(sizes)}  # nothing follows a document of one token that would begin the last row


@given(sizes=SIZES, length=LENGTHS)
def test_bytes_add_up_to_those_of_the_documents(sizes: list[int], length: int) -> None:
    rows = items(rows_of(sizes, length))
    total = sum(piece.num_bytes for row in rows for piece in row)
    assert total == sum(document.num_bytes for document in numbered(sizes))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), num_bytes=st.integers(0, 10_000), length=LENGTHS)
def test_rows_hold_the_bytes_of_their_targets(sizes: list[int], num_bytes: int, length: int) -> None:
    """Each prediction of a document stands for the same number of bytes; its first token stands for none."""
    documents = [attrs.evolve(document, num_bytes=num_bytes * (len(document.ids) > 1)) for document in numbered(sizes)]
    share = np.zeros(sum(sizes) + 1)
    for document in documents:
        share[document.ids[1:]] = document.num_bytes / max(len(document.ids) - 1, 1)
    for row in items(partial(concat, listed(documents), length=length)):
        expected = sum(share[piece.ids[1:]].sum() for piece in row)
        assert sum(piece.num_bytes for piece in row) == pytest.approx(expected, abs=len(row) + 1)


@pytest.mark.parametrize("length", [3, 8, 64])
def test_a_long_document_has_the_bytes_that_best_fit_gives_it(length: int) -> None:
    document = Tokens(np.arange(5 * length + 1, dtype=np.int32), 12_345)
    rows = items(partial(concat, listed([document]), length=length))
    assert [[piece.num_bytes for piece in row] for row in rows] == [[piece.num_bytes] for piece in split(document, length)]


@given(sizes=SIZES, length=LENGTHS)
def test_pieces_keep_their_source(sizes: list[int], length: int) -> None:
    source = np.repeat(np.arange(len(sizes)), sizes)
    for row in items(rows_of(sizes, length)):
        assert [piece.source for piece in row] == [source[piece.ids[0] - 1] for piece in row]


@given(sizes=st.lists(st.integers(0, 30), max_size=12), length=LENGTHS)
def test_concat_resumes(sizes: list[int], length: int) -> None:
    check_resumes(rows_of(sizes, length), limit=40)


def test_cursors_hold_no_data() -> None:
    cursors = [cursor for _, cursor in rows_of([5000, 1, 700] * 20, 16)(None)]
    assert len(cursors) > 1000
    assert max(len(json.dumps(cursor)) for cursor in cursors) < 20


@given(sizes=st.lists(st.integers(0, 12), max_size=12), limit=st.integers(1, 4))
def test_a_row_ends_early_where_it_holds_as_many_pieces_as_it_may(sizes: list[int], limit: int) -> None:
    source = partial(concat, listed(numbered(sizes)), length=16, limit=limit)
    rows = items(source)
    assert all(1 <= len(row) <= limit for row in rows)
    inputs = [token for row in rows for piece in row for token in piece.ids[:-1].tolist()]
    assert len(set(inputs)) == len(inputs)  # no prediction twice
    ends = [int(document.ids[-1]) for document in numbered(sizes) if len(document.ids)]
    everything = {int(token) for document in numbered(sizes) for token in document.ids}
    assert everything - set(inputs) <= set(ends)  # only what follows a document's last token may be left out
    check_resumes(source, limit=30)
