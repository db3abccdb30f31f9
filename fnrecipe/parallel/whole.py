"""Whole tensors out of the parts that ranks hold, and parts again: for what cannot be computed on a part."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.collectives import all_gather
from fnrecipe.parallel.mesh import Axis, Shard, is_shard
from fnrecipe.tree import Tree


def whole(values: Tree) -> Tree:
    """`values` with contiguous whole tensors in place of the parts, gathered over all axes; each rank holds all of them then.

    (Contiguous, because matrix products of the same numbers in another layout may round otherwise.)
    """
    leaves, spec = pytree.tree_flatten(values, is_shard)
    tensors = [tree.leaves(leaf)[0] for leaf in leaves]
    cuts = [_cuts(leaf) for leaf in leaves]
    for depth in range(max(map(len, cuts), default=0)):
        groups: dict[Axis, list[int]] = defaultdict(list)
        for number, layers in enumerate(cuts):
            if depth < len(layers):
                groups[layers[depth][1]].append(number)
        for axis, numbers in groups.items():
            gathered = all_gather([tensors[n] for n in numbers], [cuts[n][depth][0] for n in numbers], axis)
            for number, tensor in zip(numbers, gathered, strict=True):
                tensors[number] = tensor
    return pytree.tree_unflatten([tensor.contiguous() for tensor in tensors], spec)


def cut_like(values: Tree, like: Tree) -> Tree:
    """This rank's parts of whole `values`, each cut as the one in its place in `like` is; the inverse of `whole`."""
    parts, spec = pytree.tree_flatten(like, is_shard)
    return pytree.tree_unflatten([_cut(*pair) for pair in zip(tree.leaves(values), parts, strict=True)], spec)


def _cuts(leaf: Shard | Tensor) -> list[tuple[int | None, Axis]]:
    """Dimension and axis of each cut, the last one first."""
    return [*_cuts(leaf.local), (leaf.dim, leaf.axis)] if isinstance(leaf, Shard) else []


def _cut(tensor: Tensor, like: Shard | Tensor) -> Shard | Tensor:
    if not isinstance(like, Shard):
        return tensor
    if like.dim is not None and like.axis.size > 1:
        # A copy: as a view, the slice would keep all of the tensor in memory.
        tensor = tensor.chunk(like.axis.size, like.dim)[like.axis.index].clone(memory_format=torch.contiguous_format)
    return Shard(_cut(tensor, like.local), like.dim, like.axis)
