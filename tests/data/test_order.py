from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import held_out, permutation, shuffled

KEYS = st.lists(st.integers(0, 2**64), min_size=1, max_size=4)


@given(size=st.integers(0, 300), key=KEYS)
def test_permutation_is_one(size: int, key: list[int]) -> None:
    order = permutation(size, *key)
    assert sorted(order) == list(range(size))
    assert order == permutation(size, *key)


# The order of documents is a part of what a run computes: a checkpoint goes on in the order that it began with. A new
# version of NumPy that changes these numbers needs another way to compute them, not other numbers.
GOLDEN = {
    (8, 0): [0, 3, 7, 5, 1, 2, 6, 4],
    (20, 2, 7): [17, 14, 12, 19, 8, 9, 2, 11, 15, 10, 3, 18, 7, 16, 5, 13, 4, 1, 0, 6],
}


@pytest.mark.parametrize("arguments", GOLDEN)
def test_permutation_is_the_same_for_ever(arguments: tuple[int, ...]) -> None:
    assert permutation(*arguments) == GOLDEN[arguments]


@given(key=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), data=st.data())
def test_permutation_depends_on_each_part_of_the_key(key: list[int], data: st.DataObject) -> None:
    part = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda x: x != key[part]))
    assert permutation(100, *key) != permutation(100, *key[:part], other, *key[part + 1 :])


def test_permutation_depends_on_the_order_of_the_key() -> None:
    orders = {tuple(permutation(100, *key)) for key in [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 3, 2)]}
    assert len(orders) == 4


def test_every_place_is_as_likely() -> None:
    size, trials = 8, 4000
    counts = [[0] * size for _ in range(size)]
    for key in range(trials):
        for place, value in enumerate(permutation(size, key)):
            counts[place][value] += 1
    expected = trials / size
    deviation = (expected * (1 - 1 / size)) ** 0.5
    assert max(abs(count - expected) for row in counts for count in row) < 5 * deviation


@given(items=st.lists(st.text(max_size=3)), key=KEYS)
def test_shuffled_puts_items_in_the_order_of_the_permutation(items: list[str], key: list[int]) -> None:
    assert shuffled(items, *key) == [items[i] for i in permutation(len(items), *key)]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.5, 0.99, 1.0])
def test_held_out_takes_the_fraction(fraction: float) -> None:
    n = 20000
    taken = sum(held_out(f"document {i}", fraction) for i in range(n))
    assert abs(taken - n * fraction) <= 5 * (n * fraction * (1 - fraction)) ** 0.5


@given(text=st.text(st.characters(codec="utf-8")), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_held_out_depends_on_content_alone(text: str, fractions: tuple[float, float]) -> None:
    copy = text.encode().decode()
    small, large = sorted(fractions)
    assert held_out(text, small) == held_out(copy, small)
    assert held_out(text, small) <= held_out(text, large)  # a larger fraction takes no document back


def test_held_out_is_the_same_for_ever() -> None:
    assert held_out("", 1e-9)
    assert [held_out("größe 🙂", fraction) for fraction in (0.0, 0.5, 1.0)] == [False, False, True]
    assert [i for i in range(60) if held_out(f"document {i}", 0.1)] == [7, 42, 46, 52, 56]
