"""Masks of what is trained go with their tokens: through cuts, packing and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Batch, Tokens, collate, concat, pack, split
from tests.data.laws import items, listed

LENGTH = 8


@st.composite
def examples(draw: st.DrawFn) -> list[Tokens]:
    """Examples of tokens that are all different, longer ones than a row among them; some without a mask."""
    found, first = [], 0
    for size in draw(st.lists(st.integers(1, 20), min_size=1, max_size=12)):
        mask = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
        trained = None if mask is None else np.array(mask, np.bool_)
        count = size - 1 if trained is None else int(trained[1:].sum())
        found.append(Tokens(np.arange(first, first + size, dtype=np.int32), 3 * count, trained=trained))
        first += size
    return found


def targets(documents: Sequence[Tokens]) -> Counter[int]:
    """The ids that are predicted and trained, each as often as it is."""
    found: Counter[int] = Counter()
    for document in documents:
        mask = slice(None) if document.trained is None else document.trained[1:]
        found.update(document.ids[1:][mask].tolist())
    return found


def trained(batch: Batch) -> Counter[int]:
    return Counter(batch.targets[batch.mask].tolist())


@given(examples())
def test_packed_rows_train_what_the_examples_say(documents: list[Tokens]) -> None:
    rows = pack(documents, 0, length=LENGTH, key=(1,))
    batch = collate(rows, LENGTH)
    assert trained(batch) == targets(documents)
    assert batch.num_bytes.sum() == sum(document.num_bytes for document in documents)
    assert batch.num_bytes.sum() == 3 * batch.mask.sum()
    for row in rows:
        for piece in row:
            assert piece.trained is None or len(piece.trained) == len(piece.ids)


@given(examples())
def test_a_document_s_bytes_are_those_of_its_trained_targets_wherever_it_is_cut(documents: list[Tokens]) -> None:
    for document in documents:
        for piece in split(document, LENGTH):
            assert piece.num_bytes == 3 * sum(targets([piece]).values())


@given(examples())
def test_documents_end_to_end_are_trained_as_they_say(documents: list[Tokens]) -> None:
    flat = np.concatenate([document.ids for document in documents])
    masks = [np.ones(len(d.ids), np.bool_) if d.trained is None else d.trained for d in documents]
    rows = items(lambda cursor: concat(listed(documents), cursor, length=LENGTH))
    found = trained(collate(rows, LENGTH))
    allowed = set(flat[np.concatenate(masks)].tolist())
    assert set(found) <= allowed
    assert set(found.values()) <= {1}
    # What begins a row is no target, and a last token that would be alone in its row has none: of the others, all that are
    # trained are there.
    begins, shown = {int(row[0].ids[0]) for row in rows}, {int(number) for row in rows for piece in row for number in piece.ids}
    alone = {int(flat[-1])} - shown if len(documents[-1].ids) == 1 else set()
    assert allowed - begins - {int(flat[0])} - alone <= set(found)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_without_a_mask_all_targets_are_trained(length: int) -> None:
    batch = collate([[Tokens(np.arange(length + 1, dtype=np.int32), 0)], []], 8)
    assert batch.mask.tolist() == (batch.segments >= 0).tolist()
