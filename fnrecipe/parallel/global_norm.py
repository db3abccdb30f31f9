"""The Euclidean norm of a tree: the same bits however its tensors are cut over ranks."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.collectives import all_gather
from fnrecipe.parallel.mesh import Axis, is_shard
from fnrecipe.tree import Tree


def global_norm(values: Tree) -> Tensor:
    """Euclidean norm over all leaves, of all ranks, 0-d, in the leaves' precision.

    It is the norm of the norms of whole tensors and of the `Axis.blocks` blocks of those that are cut: blocks that every
    number of ranks leaves whole.
    """
    groups: dict[tuple[Axis, ...], list[Tensor]] = defaultdict(list)
    for leaf in tree.leaves(values, is_shard):
        tensor, axes = _opened(leaf)
        groups[tuple(axes)] += _blocks(tensor, axes)
    norms = torch.stack(torch._foreach_norm(list(chain(*groups.values()))))
    parts = torch.split(norms, [len(blocks) for blocks in groups.values()])
    every = [_of_all_ranks(part, axes) for part, axes in zip(parts, groups, strict=True)]
    total: Tensor = torch.linalg.vector_norm(torch.cat(every))
    return total


def _opened(leaf: Any) -> tuple[Tensor, dict[Axis, int]]:
    """The tensor of a part of a part …, and the axes over which it is cut, with the dimension."""
    if not is_shard(leaf):
        return leaf, {}
    tensor, axes = _opened(leaf.local)
    return tensor, axes if leaf.dim is None else {leaf.axis: leaf.dim, **axes}


def _blocks(tensor: Tensor, axes: dict[Axis, int]) -> list[Tensor]:
    blocks = [tensor]
    for axis, dim in axes.items():
        blocks = [part.contiguous() for block in blocks for part in block.chunk(axis.blocks // axis.size, dim)]
    return blocks


def _of_all_ranks(norms: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The norms of this rank's blocks, tensor by tensor, as those of all ranks in the order of the whole tensors; flat."""
    for axis in reversed(axes):
        (rows,) = all_gather([norms.view(-1, axis.blocks // axis.size)], [1], axis)
        norms = rows.flatten()
    return norms
