"""The Euclidean norm of a tree: the same bits however its tensors are sharded."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.collectives import all_gather
from fnrecipe.parallel.mesh import Axis, is_shard, unwrapped
from fnrecipe.parallel.norms import norms
from fnrecipe.tree import Tree


def global_norm(values: Tree) -> Tensor:
    """Euclidean norm over all leaves, of all ranks, 0-d, in the leaves' precision.

    It is the norm of the norms of unsharded tensors and of the `Axis.blocks` blocks of sharded ones.
    """
    # The rounding of a norm depends on how many elements one kernel reduces, and in which order. So a kernel only ever reduces
    # a block, whose bounds do not depend on the number of ranks: a shard is one or several blocks, never a piece of one. The
    # norms of all blocks are then gathered in the order of the unsharded tensors, and every rank reduces the same vector. A
    # sum of squares by all-reduce would be one collective less, and differ in the last bits.
    groups: dict[tuple[Axis, ...], list[Tensor]] = defaultdict(list)
    for leaf in tree.leaves(values, is_shard):
        tensor, axes = unwrapped(leaf)
        groups[tuple(axes)] += _blocks(tensor, axes)
    blocks = list(chain(*groups.values()))
    of_blocks = norms(blocks, 2, blocks[0].dtype)
    by_group = torch.split(of_blocks, [len(blocks) for blocks in groups.values()])
    of_ranks = [_gathered(local, axes) for local, axes in zip(by_group, groups, strict=True)]
    total: Tensor = torch.linalg.vector_norm(torch.cat(of_ranks))
    return total


def _blocks(tensor: Tensor, axes: dict[Axis, int]) -> list[Tensor]:
    """This rank's blocks of a tensor, contiguous: a kernel's order of additions depends on strides, too."""
    blocks = [tensor]
    for axis, dim in axes.items():
        blocks = [chunk.contiguous() for block in blocks for chunk in block.chunk(axis.blocks // axis.size, dim)]
    return blocks


def _gathered(local: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The norms of all ranks' blocks, flat, in the order of the unsharded tensors."""
    for axis in reversed(axes):
        (rows,) = all_gather([local.view(-1, axis.blocks // axis.size)], [1], axis)
        local = rows.flatten()
    return local
