"""Unsharding: all-gathers of sharded parameters, whose gradients are reduce-scattered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.ops import may_be_differentiated
from fnrecipe.parallel.collectives import Linear, all_gather, buckets, reduce_scatter, with_transpose
from fnrecipe.parallel.mesh import Shard
from fnrecipe.transforms.remat import remat
from fnrecipe.tree import Tree


def unsharded_layer(function: Callable[..., Tree], *, recompute: bool = False) -> Callable[..., Tree]:
    """`function(params, …)` on sharded params: all-gathered in the forward pass, freed, and all-gathered again in the backward.

    The backward pass recomputes the function's values too; with `recompute`, also where there is nothing to gather.
    """
    recomputed = remat(lambda params, *args: function(unshard(params), *args))
    return lambda params, *args: (
        recomputed(params, *args) if recompute or _is_spread(params) else function(unshard(params), *args)
    )


def unshard(values: Tree) -> Tree:
    """`values` with every shard over the shard axis all-gathered. The transpose of an all-gather is a reduce-scatter."""
    leaves, spec = pytree.tree_flatten(values, on_shard_axis)
    numbered = {number: leaf for number, leaf in enumerate(leaves) if on_shard_axis(leaf)}
    # Two groups: all results of one function have a gradient if any of its arguments has one, and each would be summed.
    for differentiated in (True, False):
        shards = {number: shard for number, shard in numbered.items() if may_be_differentiated(shard.local) is differentiated}
        for number, tensor in zip(shards, _all_gathered([*shards.values()], differentiated), strict=True):
            leaves[number] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _all_gathered(shards: Sequence[Shard], differentiated: bool) -> Sequence[Tensor]:
    def gather(locals: Sequence[Tensor]) -> Sequence[Tensor]:
        return _gathered(locals, shards)

    if not shards:
        return []
    return _with_sum(gather, shards) if differentiated else gather([shard.local for shard in shards])


def with_bucketed_gradients(gathered: Tree, params: Tree) -> Tree:
    """`gathered`, differentiated as if it were gathered from `params` here, in buckets.

    The gradients of each bucket are reduce-scattered as soon as they are computed.
    """
    full, shards = tree.leaves(gathered), tree.leaves(params, on_shard_axis)

    def lend(bucket: Sequence[int]) -> Sequence[Tensor]:
        return _with_sum(lambda locals: [full[number] for number in bucket], [shards[number] for number in bucket])

    lent = {number: tensor for bucket in buckets(full) for number, tensor in zip(bucket, lend(bucket), strict=True)}
    return tree.like(gathered, [lent[number] for number in range(len(full))])


def _with_sum(function: Linear, shards: Sequence[Shard]) -> Sequence[Tensor]:
    """The full tensors that `function` makes of the shards; their gradients are reduce-scattered."""
    dims, axis = [shard.dim for shard in shards], shards[0].axis
    if axis.size == 1 and all(shard.axis.gathered is None for shard in shards):
        return [shard.local for shard in shards]
    return with_transpose(function, lambda full: reduce_scatter(full, dims, axis))([shard.local for shard in shards])


def _gathered(locals: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    dims, axis = [shard.dim for shard in shards], shards[0].axis
    rounded = [local.to(shard.axis.gathered or local.dtype) for local, shard in zip(locals, shards, strict=True)]
    return [tensor.to(local.dtype) for tensor, local in zip(all_gather(rounded, dims, axis), locals, strict=True)]


def on_shard_axis(value: object) -> bool:
    return isinstance(value, Shard) and value.axis.name == "shard"


def _is_spread(params: Tree) -> bool:
    return any(shard.axis.size > 1 for shard in tree.leaves(params, on_shard_axis) if on_shard_axis(shard))
