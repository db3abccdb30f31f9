"""Windows of documents: every prediction is scored once, with the context that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Tokens, split
from fnrecipe.data.windows import collate_windows, rows_of_windows, windows


def document(predictions: int, num_bytes: int = 1000) -> Tokens:
    return Tokens(np.arange(predictions + 1, dtype=np.int32), num_bytes)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_each_prediction_is_scored_once_in_the_first_window_that_has_it(n: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    found = windows(document(n), length, stride)
    starts = [int(window.tokens.ids[0]) for window in found]
    scored = [int(target) for window in found for target in window.tokens.ids[1:][window.context :]]
    assert scored == list(range(1, n + 1))
    assert starts == [number * stride for number in range(len(found))]
    assert all(0 < len(window.tokens.ids) - 1 <= length for window in found)
    assert all(window.context == length - stride for window in found[1:])
    assert [window.is_first for window in found] == [True] + [False] * (len(found) - 1)
    assert sum(window.tokens.num_bytes for window in found) == 1000


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 30])
def test_windows_that_do_not_overlap_are_the_pieces_that_packing_cuts(n: int) -> None:
    found, pieces = windows(document(n), 8, 8), split(document(n), 8)
    assert [window.tokens.ids.tolist() for window in found] == [piece.ids.tolist() for piece in pieces]
    assert [window.tokens.num_bytes for window in found] == [piece.num_bytes for piece in pieces]


def test_context_is_input_and_no_target() -> None:
    (first, second), padding = rows_of_windows([document(10)], 0, length=8, stride=3, limit=16), []
    found = collate_windows([first, second, padding], 8)
    assert found.documents.tolist() == [1, 0, 0]
    assert found.batch.tokens.tolist() == [[*range(8)], [3, 4, 5, 6, 7, 8, 9, 0], [0] * 8]
    assert found.batch.mask.tolist() == [[True] * 8, [False] * 5 + [True] * 2 + [False], [False] * 8]


def test_documents_share_rows_unless_their_tokens_would_see_each_other() -> None:
    documents = [document(3), document(5), document(2)]
    packed = rows_of_windows(documents, 0, length=8, stride=8, limit=16)
    assert sorted(sorted(len(window.tokens.ids) - 1 for window in row) for row in packed) == [[2], [3, 5]]
    assert [len(row) for row in rows_of_windows(documents, 0, length=8, stride=8, limit=1)] == [1, 1, 1]
