"""Collectives in processes of their own, against sums and slices in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import tree
from fnrecipe.parallel import collectives
from fnrecipe.parallel.collectives import all_gather, all_reduce, reduce_scatter, with_transpose
from fnrecipe.transforms import accumulate
from tests.helpers import assert_close, assert_same_bits
from tests.ranks import on_ranks, world

LEAVES = 8
DIMS = {
    "matrix": 0,
    "row a rank": 0,
    "columns": 1,
    "middle": 1,
    "vector": 0,
    "double": 0,
    "uncut": None,
    "scalar": None,
    "count": None,
}


def values(leaf: int) -> dict[str, Tensor]:
    """What one leaf gives: tensors of several dtypes; the uncut ones of sizes that no world size divides."""
    generator = torch.Generator().manual_seed(leaf)

    def normal(*shape: int, **options: Any) -> Tensor:
        return torch.randn(shape, generator=generator, **options)

    return {
        "matrix": normal(8, 3) * 10.0 ** torch.randint(-6, 6, (8, 3), generator=generator),
        "row a rank": normal(4, 3),
        "columns": normal(3, 16),
        "middle": normal(2, 8, 3),
        "vector": normal(8),
        "double": normal(8, dtype=torch.float64),
        "uncut": normal(7, 3),
        "scalar": normal(),
        "count": torch.tensor(leaf + 1),
    }


def of_rank(rank: int, size: int) -> dict[str, Tensor]:
    """The tree's sum over the rank's own leaves."""
    share = LEAVES // size
    leaves = torch.arange(rank * share, (rank + 1) * share)
    sums: dict[str, Tensor] = accumulate(lambda _, leaf: values(int(leaf[0])), share)(None, leaves)
    return sums


def slices(whole: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
    return [leaf if DIMS[name] is None else leaf.chunk(size, DIMS[name])[rank] for name, leaf in whole.items()]


def check_sums(rank: int, size: int, bucket_bytes: int) -> None:
    collectives._BUCKET_BYTES = bucket_bytes
    axis, fast = world(rank, size), world(rank, size, ordered=False)
    mine, expected = of_rank(rank, size), of_rank(0, 1)

    def everything(value: dict[str, Tensor]) -> Any:
        cut = reduce_scatter(list(value.values()), list(DIMS.values()), axis)
        return all_reduce(value, axis), cut, all_gather(cut, list(DIMS.values()), axis)

    truth = expected, slices(expected, rank, size), list(expected.values())
    assert_same_bits(everything(mine), truth)
    assert all(gathered.is_contiguous() for gathered in everything(mine)[2])
    graph = make_fx(everything, tracing_mode="fake", _allow_non_fake_inputs=True)(mine)
    assert_same_bits(graph(mine), truth)
    starts = sum("all_to_all_single" in str(node.target) for node in graph.graph.nodes)
    assert starts == (7 if bucket_bytes > 1000 else 18)  # a bucket for each dtype, or for each tensor
    close = all_reduce(mine, fast), reduce_scatter(list(mine.values()), list(DIMS.values()), fast)
    assert_close(tree.map(Tensor.double, close), tree.map(Tensor.double, truth[:2]), 1e-5)


@pytest.mark.parametrize(("size", "bucket_bytes"), [(2, 16), (4, 1 << 20)])
def test_sums_over_ranks_have_the_bits_of_one_process(size: int, bucket_bytes: int) -> None:
    on_ranks(size, check_sums, bucket_bytes)


def test_the_order_of_the_sum_matters() -> None:
    total = values(0)
    for leaf in range(1, LEAVES):
        total = tree.map(torch.add, total, values(leaf))
    assert any((a != b).any() for a, b in zip(tree.leaves(total), tree.leaves(of_rank(0, 1)), strict=True))


def check_gradients(rank: int, size: int) -> None:
    """The gradient of the sum over ranks of a function of a gathered tensor is the slice of the whole function's gradient."""
    axis = world(rank, size)
    whole = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = torch.randn(size, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def all_of_it(part: Tensor) -> Tensor:
        return with_transpose(lambda xs: all_gather(xs, [0], axis), lambda xs: reduce_scatter(xs, [0], axis))([part])[0]

    def of_gathered(part: Tensor, factor: Tensor) -> Tensor:
        return (torch.sin(all_of_it(part)) * factor).sum()

    part = whole.chunk(size)[rank]
    expected = grad(lambda x: sum((torch.sin(x) * factor).sum() for factor in factors))(whole).chunk(size)[rank]
    assert_close(grad(of_gathered)(part, factors[rank]), expected, 1e-12)
    traced = make_fx(grad(of_gathered), tracing_mode="fake", _allow_non_fake_inputs=True)(part, factors[rank])
    assert_same_bits(traced(part, factors[rank]), grad(of_gathered)(part, factors[rank]))
    # Finite differences: rank 0 moves one number of its part, and all ranks add up what they see.
    distance = 1e-6 * torch.nn.functional.one_hot(torch.tensor(3), part.numel()).view(part.shape) * (rank == 0)
    ends = [of_gathered(part + sign * distance, factors[rank]) for sign in (1, -1)]
    slope = (all_reduce([ends[0]], axis)[0] - all_reduce([ends[1]], axis)[0]) / 2e-6
    if rank == 0:
        torch.testing.assert_close(slope, expected.flatten()[3], rtol=1e-6, atol=1e-8)
    # And the gradient of a gradient, which goes through the transpose and back.
    twice = grad(lambda x, f: grad(of_gathered)(x, f).square().sum())(part, factors[rank])
    total = sum(factors)
    truth = grad(lambda x: grad(lambda y: (torch.sin(y) * total).sum())(x).square().sum())(whole).chunk(size)[rank]
    assert_close(twice, truth, 1e-12)


def test_the_transpose_of_gathering_is_to_sum_and_cut() -> None:
    on_ranks(2, check_gradients)
