"""The Euclidean norm of a tree: the same bits however its tensors are cut over ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.collectives import gather
from fnrecipe.parts import Axis, is_part
from fnrecipe.tree import Tree


def global_norm(values: Tree) -> Tensor:
    """Euclidean norm over all leaves, of all ranks, 0-d, in the leaves' precision.

    It is the norm of the norms of whole tensors and of the `Axis.blocks` blocks of those that are cut: blocks that every
    number of ranks leaves whole.
    """
    leaves = [_opened(leaf) for leaf in tree.leaves(values, is_part)]
    blocks = [_blocks(tensor, axes) for tensor, axes in leaves]
    norms = iter(torch._foreach_norm([block for group in blocks for block in group]))
    rows: dict[tuple[Axis, ...], list[Tensor]] = defaultdict(list)
    for (_, axes), group in zip(leaves, blocks, strict=True):
        rows[tuple(axes)].append(torch.stack([next(norms) for _ in group]))
    total: Tensor = torch.linalg.vector_norm(torch.cat([_of_all_ranks(torch.stack(row), axes) for axes, row in rows.items()]))
    return total


def _opened(leaf: Any) -> tuple[Tensor, dict[Axis, int]]:
    """The tensor of a part of a part …, and the axes over which it is cut, with the dimension."""
    if not is_part(leaf):
        return leaf, {}
    tensor, axes = _opened(leaf.local)
    return tensor, axes if leaf.dim is None else {leaf.axis: leaf.dim, **axes}


def _blocks(tensor: Tensor, axes: dict[Axis, int]) -> list[Tensor]:
    blocks = [tensor]
    for axis, dim in axes.items():
        blocks = [part.contiguous() for block in blocks for part in block.chunk(axis.blocks // axis.size, dim)]
    return blocks


def _of_all_ranks(norms: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The norms [tensors, blocks] of this rank's parts, as those of all ranks, flat."""
    for axis in axes:
        (norms,) = gather([norms], [1], axis)
    return norms.flatten()
