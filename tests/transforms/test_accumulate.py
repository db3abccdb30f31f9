"""The sum over leaves is one fixed binary tree."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe.transforms import accumulate, jit
from tests.helpers import assert_same_bits

NUM_LEAVES = (1, 2, 4, 8, 16)


def power(params: Tensor, leaf: dict[str, Tensor]) -> dict[str, Any]:
    """Something whose sum depends on the order of summation."""
    return {"sum": (leaf["x"] * params).sum(0), "more": (leaf["x"].exp(), leaf["n"].sum())}


def rows(number: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(number, 50, generator=generator) * 100 / 9, "n": torch.arange(number)}


def part(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: values[start:stop] for name, values in batch.items()}


def balanced(values: list[Tensor]) -> Tensor:
    """The sum of both halves' sums."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return balanced(values[:middle]) + balanced(values[middle:])


PARAMS = rows(1, seed=1)["x"][0]


@pytest.mark.parametrize("num_microbatches", NUM_LEAVES)
def test_the_sum_is_the_balanced_tree(num_microbatches: int) -> None:
    batch = rows(3 * num_microbatches)
    found = accumulate(power, num_microbatches)(PARAMS, batch)
    each = [power(PARAMS, part(batch, 3 * i, 3 * i + 3)) for i in range(num_microbatches)]
    assert_same_bits(found["sum"], balanced([value["sum"] for value in each]))
    assert_same_bits(found["more"][0], balanced([value["more"][0] for value in each]))
    assert found["more"][1] == sum(range(3 * num_microbatches))


def test_another_order_gives_other_bits() -> None:
    each = [power(PARAMS, part(rows(16), i, i + 1))["sum"] for i in range(16)]
    assert not torch.equal(balanced(each), sum(each[1:], each[0]))


@given(st.data(), st.integers(0, 5), st.integers(0, 2**16))
def test_any_aligned_power_of_two_run_of_leaves_is_a_subtree(data: st.DataObject, depth: int, seed: int) -> None:
    """What a gang of any size computes: each rank its run, then the tree over the ranks."""
    num_microbatches, world = 2**depth, 2 ** data.draw(st.integers(0, depth))
    share, batch = num_microbatches // world, rows(num_microbatches, seed)
    ranks = [accumulate(power, share)(PARAMS, part(batch, rank * share, (rank + 1) * share)) for rank in range(world)]
    whole = accumulate(power, num_microbatches)(PARAMS, batch)
    assert_same_bits(balanced([rank["sum"] for rank in ranks]), whole["sum"])


@pytest.mark.parametrize("num_microbatches", NUM_LEAVES)
def test_few_partial_sums_live_at_once(num_microbatches: int) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(torch.Tensor):
        """A tensor whose sums are noted."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.add:
                made.append(weakref.ref(result))
            return result

    def leaf(params: Tensor, batch: Tensor) -> Tensor:
        nonlocal most
        result = (batch * params).sum().as_subclass(Counted)
        made.append(weakref.ref(result))
        most = max(most, sum(reference() is not None for reference in made))
        return result

    accumulate(leaf, num_microbatches)(torch.tensor(2.0), torch.ones(num_microbatches))
    assert most == math.log2(num_microbatches) + 1


@pytest.mark.parametrize("num_microbatches", NUM_LEAVES)
def test_traced_it_is_the_same_tree(num_microbatches: int) -> None:
    function, batch = accumulate(power, num_microbatches), rows(num_microbatches)
    assert_same_bits(jit(function)(PARAMS, batch), function(PARAMS, batch))
