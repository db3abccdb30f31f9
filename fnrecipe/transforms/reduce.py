"""Sums over the ranks of a gang: in an order that does not depend on how many there are, or as the library adds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from fnrecipe import tree
from fnrecipe.tree import Tree

_BUCKET_BYTES = 32 << 20


def tree_sum(values: Tree, *, world_size: int, group: str) -> Tree:
    """The sum of all ranks' `values`, on every rank, in the balanced binary tree over a power of two of ranks.

    If each rank's values are the tree's sums over its run of neighbouring leaves (`accumulate`), the result has the same
    bits at any world size. Each rank gets its part of every rank's values, adds these up and sends the sum to all: the
    bytes of a ring all-reduce. Tensors travel in buckets, and a bucket is added up while the next one is on its way.
    """

    def sums(buckets: Sequence[Tensor]) -> Iterator[Tensor]:
        padded = [torch.nn.functional.pad(bucket, (0, -len(bucket) % world_size)) for bucket in buckets]
        parts = [collectives.all_to_all_single(bucket, None, None, cast(Any, group)) for bucket in padded]
        shards = [_tree(list(_wait(part).chunk(world_size))) for part in parts]
        wholes = [collectives.all_gather_single(shard, 0, cast(Any, group)) for shard in shards]
        yield from (_wait(whole)[: len(bucket)] for whole, bucket in zip(wholes, buckets, strict=True))

    return _in_buckets(values, sums)


def fast_sum(values: Tree, *, group: str) -> Tree:
    """The sum of all ranks' `values`, on every rank, by the library's all-reduce: its order changes with the world size."""

    def sums(buckets: Sequence[Tensor]) -> Iterator[Tensor]:
        yield from map(_wait, [collectives.all_reduce(bucket, "sum", cast(Any, group)) for bucket in buckets])

    return _in_buckets(values, sums)


def _in_buckets(values: Tree, sums: Callable[[Sequence[Tensor]], Iterator[Tensor]]) -> Tree:
    """`sums` of the leaves, laid end to end in flat buckets of one dtype each."""
    leaves = tree.leaves(values)
    buckets = list(_buckets(leaves))
    flats = [torch.cat([leaves[number].flatten() for number in bucket]) for bucket in buckets]
    found: dict[int, Tensor] = {}
    for bucket, flat in zip(buckets, sums(flats), strict=True):
        pieces = torch.split(flat, [leaves[number].numel() for number in bucket])
        found |= {number: piece.view(leaves[number].shape) for number, piece in zip(bucket, pieces, strict=True)}
    return tree.like(values, [found[number] for number in range(len(leaves))])


def _buckets(leaves: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of the leaves of each bucket."""
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        bucket: list[int] = []
        size = 0
        for number, leaf in enumerate(leaves):
            if leaf.dtype == dtype:
                if bucket and size + leaf.nbytes > _BUCKET_BYTES:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(number)
                size += leaf.nbytes
        yield bucket


def _tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _wait(tensor: Any) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return waited
