"""Whether numbers are finite, told on the device: on every rank the same, however tensors are cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.collectives import all_gather
from fnrecipe.parallel.mesh import Axis, is_shard
from fnrecipe.tree import Tree


def largest(values: Tree, params: Tree) -> Tensor:
    """The greatest magnitude of a number in `values` on any of the ranks over which `params` are cut, float64 [].

    It is NaN if a number is, and 0 if there are none. Integers do not count.
    """
    tensors = [leaf for leaf in tree.leaves(values) if leaf.is_floating_point() and leaf.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=tree.leaves(params)[0].device)
    # One pass without a copy, where `abs` would make one; the infinity norm takes ten times as long on a CPU.
    lows, highs = zip(*map(torch.aminmax, tensors), strict=True)
    found = torch.maximum(-torch.stack(lows).amin(), torch.stack(highs).amax()).double()
    for axis in _axes(params):
        (every,) = all_gather([found.view(1)], [0], axis)
        found = every.amax()
    return found


def finite(values: Tree, like: Tree, params: Tree) -> Tensor:
    """Whether all numbers in `values` are finite, also once they are kept as `like` is; bool []."""
    limits = [torch.finfo(leaf.dtype).max for leaf in tree.leaves(like) if leaf.is_floating_point()]
    return largest(values, params) <= min(limits, default=torch.inf)


def _axes(params: Tree) -> dict[Axis, None]:
    """The axes over which tensors are cut, in an order that all ranks have in common."""
    return dict.fromkeys(axis for leaf in tree.leaves(params, is_shard) for axis in _cuts(leaf))


def _cuts(leaf: Any) -> Iterator[Axis]:
    while is_shard(leaf):
        if leaf.dim is not None:
            yield leaf.axis
        leaf = leaf.local
