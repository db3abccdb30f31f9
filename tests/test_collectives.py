"""Sums over ranks in processes of their own, against sums in one process."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import tree
from fnrecipe.transforms import accumulate, fast_sum, reduce, tree_sum
from tests.helpers import assert_close, assert_same_bits

LEAVES = 8


def values(leaf: int) -> Any:
    """What one leaf gives: tensors of several dtypes and of sizes that no world size divides."""
    generator = torch.Generator().manual_seed(leaf)
    scale = 10.0 ** torch.randint(-6, 6, (7, 3), generator=generator)
    return {
        "matrix": torch.randn(7, 3, generator=generator) * scale,
        "vector": torch.randn(5, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
        "count": torch.tensor(leaf + 1),
    }


def of_rank(rank: int, size: int) -> Any:
    """The tree's sum over the rank's own leaves."""
    share = LEAVES // size
    leaves = torch.arange(rank * share, (rank + 1) * share)
    return accumulate(lambda _, leaf: values(int(leaf[0])), share)(None, leaves)


def check(rank: int, size: int, port: int, bucket_bytes: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    group, reduce._BUCKET_BYTES = dist.group.WORLD.group_name, bucket_bytes
    mine, expected = of_rank(rank, size), of_rank(0, 1)

    def invariant(value: Any) -> Any:
        return tree_sum(value, world_size=size, group=group)

    assert_same_bits(invariant(mine), expected)
    graph = make_fx(invariant, tracing_mode="fake", _allow_non_fake_inputs=True)(mine)
    assert_same_bits(graph(mine), expected)
    names = [str(node.target) for node in graph.graph.nodes]
    buckets = 3 if bucket_bytes > 1000 else 5
    assert sum("all_to_all_single" in name for name in names) == buckets
    assert sum("all_gather" in name for name in names) == buckets
    assert_close(tree.map(torch.Tensor.double, fast_sum(mine, group=group)), tree.map(torch.Tensor.double, expected), 1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 16])
def test_the_sum_over_ranks_has_the_bits_of_one_process(size: int, bucket_bytes: int) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(check, (size, port, bucket_bytes), nprocs=size)


def test_the_order_of_the_sum_matters() -> None:
    total = values(0)
    for leaf in range(1, LEAVES):
        total = tree.map(torch.add, total, values(leaf))
    assert any((a != b).any() for a, b in zip(tree.leaves(total), tree.leaves(of_rank(0, 1)), strict=True))
