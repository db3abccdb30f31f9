"""Gathering of parameters that are cut over the ranks of an axis."""

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
    """`function(params, …)` of parts: gathered when it runs and again when its gradient is taken, and never kept in between.

    Its values are computed again then too, whether or not there is anything to gather if `recompute` says so.
    """
    recomputed = remat(lambda params, *args: function(unshard(params), *args))
    return lambda params, *args: (
        recomputed(params, *args) if recompute or _is_spread(params) else function(unshard(params), *args)
    )


def unshard(values: Tree) -> Tree:
    """`values` with every part of the shard axis gathered. The transpose of gathering is to sum over the ranks, and to cut."""
    leaves, spec = pytree.tree_flatten(values, on_shard_axis)
    numbered = {number: leaf for number, leaf in enumerate(leaves) if on_shard_axis(leaf)}
    # Two groups: all results of one function have a gradient if any of its arguments has one, and each would be summed.
    for differentiated in (True, False):
        parts = {number: part for number, part in numbered.items() if may_be_differentiated(part.local) is differentiated}
        for number, tensor in zip(parts, _whole([*parts.values()], differentiated), strict=True):
            leaves[number] = tensor
    return pytree.tree_unflatten(leaves, spec)


def _whole(parts: Sequence[Shard], differentiated: bool) -> Sequence[Tensor]:
    def gather(locals: Sequence[Tensor]) -> Sequence[Tensor]:
        return _gathered(locals, parts)

    if not parts:
        return []
    return _with_sum(gather, parts) if differentiated else gather([part.local for part in parts])


def with_bucketed_gradients(gathered: Tree, params: Tree) -> Tree:
    """`gathered`, as if it were gathered now from `params`, in buckets: each is summed as soon as its gradients are there."""
    wholes, parts = tree.leaves(gathered), tree.leaves(params, on_shard_axis)

    def lend(bucket: Sequence[int]) -> Sequence[Tensor]:
        return _with_sum(lambda locals: [wholes[number] for number in bucket], [parts[number] for number in bucket])

    lent = {number: whole for bucket in buckets(wholes) for number, whole in zip(bucket, lend(bucket), strict=True)}
    return tree.like(gathered, [lent[number] for number in range(len(wholes))])


def _with_sum(function: Linear, parts: Sequence[Shard]) -> Sequence[Tensor]:
    """The whole tensors that `function` makes of the parts; their gradients are summed over the ranks, and cut."""
    dims, axis = [part.dim for part in parts], parts[0].axis
    if axis.size == 1 and all(part.axis.gathered is None for part in parts):
        return [part.local for part in parts]
    return with_transpose(function, lambda wholes: reduce_scatter(wholes, dims, axis))([part.local for part in parts])


def _gathered(locals: Sequence[Tensor], parts: Sequence[Shard]) -> list[Tensor]:
    dims, axis = [part.dim for part in parts], parts[0].axis
    rounded = [local.to(part.axis.gathered or local.dtype) for local, part in zip(locals, parts, strict=True)]
    return [whole.to(local.dtype) for whole, local in zip(all_gather(rounded, dims, axis), locals, strict=True)]


def on_shard_axis(value: object) -> bool:
    return isinstance(value, Shard) and value.axis.name == "shard"


def _is_spread(params: Tree) -> bool:
    return any(part.axis.size > 1 for part in tree.leaves(params, on_shard_axis) if on_shard_axis(part))
