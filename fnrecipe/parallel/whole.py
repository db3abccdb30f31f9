"""Whole tensors out of the parts that ranks hold, and parts again: for what cannot be computed on a part."""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.collectives import all_gather
from fnrecipe.parallel.mesh import Shard, is_shard, unwrapped
from fnrecipe.tree import Tree


def whole(values: Tree) -> Tree:
    """`values` with contiguous whole tensors in place of the parts, gathered over all axes; each rank holds all of them then.

    (Contiguous, because matrix products of the same numbers in another layout may round otherwise.)
    """
    leaves, spec = pytree.tree_flatten(values, is_shard)
    found = [unwrapped(leaf) for leaf in leaves]
    tensors, cuts = [tensor for tensor, _ in found], [axes for _, axes in found]
    # All tensors are cut over the axes of the mesh in the same order, which those show that are cut over most of them. So the
    # axes can be gathered one after the other, the one that was cut last first.
    for axis in reversed(dict.fromkeys(axis for axes in sorted(cuts, key=len, reverse=True) for axis in axes)):
        numbers = [number for number, axes in enumerate(cuts) if axis in axes]
        gathered = all_gather([tensors[n] for n in numbers], [cuts[n][axis] for n in numbers], axis)
        for number, tensor in zip(numbers, gathered, strict=True):
            tensors[number] = tensor
    return pytree.tree_unflatten([tensor.contiguous() for tensor in tensors], spec)


def cut_like(values: Tree, like: Tree) -> Tree:
    """This rank's parts of whole `values`, each cut as the one in its place in `like` is; the inverse of `whole`."""
    parts, spec = pytree.tree_flatten(like, is_shard)
    return pytree.tree_unflatten([_cut(*pair) for pair in zip(tree.leaves(values), parts, strict=True)], spec)


def _cut(tensor: Tensor, like: Shard | Tensor) -> Shard | Tensor:
    if not isinstance(like, Shard):
        return tensor
    if like.dim is not None and like.axis.size > 1:
        # A copy: as a view, the slice would keep all of the tensor in memory.
        tensor = tensor.chunk(like.axis.size, like.dim)[like.axis.index].clone(memory_format=torch.contiguous_format)
    return Shard(_cut(tensor, like.local), like.dim, like.axis)
