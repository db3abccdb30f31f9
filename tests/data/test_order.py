from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Document, held_out, permutation, shuffled

KEYS = st.lists(st.integers(0, 2**64), min_size=1, max_size=4)
TEXTS = st.text(st.characters(codec="utf-8"))
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
FRACTIONS = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(size=st.integers(0, 300), key=KEYS)
def test_permutation_is_one(size: int, key: list[int]) -> None:
    order = permutation(size, *key)
    assert (order.dtype, order.shape) == (np.int64, (size,))
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == permutation(size, *key).tolist()


# The order of documents is a part of what a run computes: a checkpoint goes on in the order that it began with. A new
# version of NumPy that changes these numbers needs another way to compute them, not other numbers.
GOLDEN = {
    (8, 0): [0, 3, 7, 5, 1, 2, 6, 4],
    (20, 2, 7): [17, 14, 12, 19, 8, 9, 2, 11, 15, 10, 3, 18, 7, 16, 5, 13, 4, 1, 0, 6],
    (20, 2**40, 3, 1): [7, 9, 17, 11, 10, 6, 13, 12, 19, 16, 1, 14, 2, 8, 5, 18, 0, 15, 4, 3],
}


@pytest.mark.parametrize("arguments", GOLDEN)
def test_permutation_is_the_same_for_ever(arguments: tuple[int, ...]) -> None:
    assert permutation(*arguments).tolist() == GOLDEN[arguments]


def test_a_long_permutation_is_the_same_for_ever() -> None:
    order = permutation(300_000, 5)
    assert order[:6].tolist() == [226812, 161978, 278542, 21190, 297677, 88611]
    assert zlib.crc32(order.astype("<i8").tobytes()) == 0x20FBEC12


@given(key=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), data=st.data())
def test_permutation_depends_on_each_part_of_the_key(key: list[int], data: st.DataObject) -> None:
    part = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda x: x != key[part]))
    assert permutation(100, *key).tolist() != permutation(100, *key[:part], other, *key[part + 1 :]).tolist()


def test_permutation_depends_on_the_order_of_the_key() -> None:
    orders = {tuple(permutation(100, *key).tolist()) for key in [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 3, 2)]}
    assert len(orders) == 4


def test_every_place_is_as_likely() -> None:
    size, trials = 8, 4000
    counts = [[0] * size for _ in range(size)]
    for key in range(trials):
        for place, value in enumerate(permutation(size, key).tolist()):
            counts[place][value] += 1
    expected = trials / size
    deviation = (expected * (1 - 1 / size)) ** 0.5
    assert max(abs(count - expected) for row in counts for count in row) < 5 * deviation


@given(items=st.lists(st.integers(), max_size=20), key=KEYS)
def test_shuffled_puts_items_in_the_order_of_the_permutation(items: list[int], key: list[int]) -> None:
    assert shuffled(items, *key) == [items[i] for i in permutation(len(items), *key).tolist()]


def document_of_ids(ids: list[int]) -> Document:
    return Document(ids=np.array(ids, np.int32))


@pytest.mark.parametrize("kind", ["text", "ids"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.5, 0.99, 1.0])
def test_held_out_takes_the_fraction(fraction: float, kind: str) -> None:
    n = 20000
    documents = [Document(f"document {i}") if kind == "text" else document_of_ids([i, i * i, 7]) for i in range(n)]
    taken = sum(held_out(document, fraction) for document in documents)
    assert abs(taken - n * fraction) <= 5 * (n * fraction * (1 - fraction)) ** 0.5


@given(text=TEXTS, fractions=FRACTIONS, ids=IDS)
def test_held_out_depends_on_the_text_alone(text: str, fractions: tuple[float, float], ids: list[int]) -> None:
    copies = [Document(text.encode().decode()), Document(text, np.array(ids, np.int32))]
    small, large = sorted(fractions)
    for copy in copies:
        assert held_out(copy, small) == held_out(Document(text), small)
    assert held_out(Document(text), small) <= held_out(Document(text), large)  # a larger fraction takes no document back


@given(ids=IDS, fractions=FRACTIONS)
def test_held_out_depends_on_the_ids_where_there_is_no_text(ids: list[int], fractions: tuple[float, float]) -> None:
    small, large = sorted(fractions)
    padded = document_of_ids([0, *ids, 0]).ids
    assert padded is not None
    assert held_out(document_of_ids(ids), small) == held_out(Document(ids=padded[1:-1]), small)
    assert held_out(document_of_ids(ids), small) <= held_out(document_of_ids(ids), large)


def test_held_out_is_the_same_for_ever() -> None:
    assert held_out(Document(""), 1e-9)
    assert [held_out(Document("größe 🙂"), fraction) for fraction in (0.0, 0.5, 1.0)] == [False, False, True]
    assert [i for i in range(60) if held_out(Document(f"document {i}"), 0.1)] == [7, 42, 46, 52, 56]
    assert [i for i in range(60) if held_out(document_of_ids([i, 1]), 0.1)] == [1, 8, 15, 53, 59]


def test_a_document_of_nothing_is_not_held_out() -> None:
    assert not held_out(Document(), 1.0)
    assert not any([Document(), Document(""), document_of_ids([])])
    assert all([Document(" "), document_of_ids([0])])
