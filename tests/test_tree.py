"""Trees: dotted paths there and back, and selection."""

from __future__ import annotations

import attrs
import torch

from fnrecipe import tree
from tests.helpers import assert_same_bits


@tree.node
@attrs.frozen(eq=False)
class Pair:
    left: object
    right: object


VALUE = Pair({"b": torch.arange(3.0), "a": (torch.tensor(1), {"x": torch.ones(2, 2)})}, [torch.zeros(0)])


def test_paths_name_attributes_keys_and_indices() -> None:
    assert set(tree.paths(VALUE)) == {"left.b", "left.a.0", "left.a.1.x", "right.0"}
    assert tree.paths(VALUE)["left.a.1.x"] is VALUE.left["a"][1]["x"]


def test_from_paths_is_the_inverse_of_paths_in_any_order() -> None:
    backwards = dict(reversed(tree.paths(VALUE).items()))
    assert_same_bits(tree.from_paths(VALUE, backwards), VALUE)


def test_map_keeps_the_structure_and_pairs_leaves_by_place() -> None:
    assert_same_bits(tree.map(lambda a, b: a + b, VALUE, VALUE), tree.map(lambda a: 2 * a, VALUE))


def test_select_takes_whole_leaves_even_over_nan() -> None:
    yes, no = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([torch.nan, torch.inf])}
    assert_same_bits(tree.select(torch.tensor(True), yes, no), yes)
    assert_same_bits(tree.select(torch.tensor(False), yes, no), no)
