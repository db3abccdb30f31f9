"""A weight with an adapter of low rank beside it.

(LoRA: Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353.)
"""

from __future__ import annotations

from typing import TypeAlias

import attrs
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import tree
from fnrecipe.nn.noise import dropout, position_numbers
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Shard
from fnrecipe.tree import Tree

Plain: TypeAlias = Tensor | Shard


@tree.node
@attrs.frozen(eq=False)
class Adapted:
    """The weight W + scale · b a, kept apart, so that no gradient of W is ever made; each part may be a shard.

    base       W [F, D]
    a, b       [r, D] and [F, r]
    magnitude  of DoRA, [F]: row f is scaled to this norm; () for LoRA
    key        what dropout of what a multiplies comes from, int64 [2]; (): nothing is dropped
    dropout    the probability by which an element of that is dropped
    """

    base: Plain
    a: Plain
    b: Plain
    magnitude: Tree
    key: Tree
    scale: float = attrs.field(metadata=tree.STATIC)
    dropout: float = attrs.field(metadata=tree.STATIC)


def own(weight: Plain) -> Tensor:
    """What this rank multiplies by: its slice, or a weight that all ranks share, whose gradient is all-reduced."""
    if not isinstance(weight, Shard):
        return weight
    local: Tensor = tensor_parallel.shared(weight) if weight.dim is None else weight.local
    return local


def product(x: Tensor, weight: Adapted) -> Tensor:
    """x W' + (scale · x a') b', with transposed weights in the dtype of x: this rank's part of it, as that of W alone is.

    Of x, [B, T, D], elements are dropped before a, where there is a key.
    """
    low = F.linear(_dropped(x, weight), own(weight.a).to(x.dtype)) * weight.scale
    return F.linear(x, own(weight.base).to(x.dtype)) + F.linear(low, own(weight.b).to(x.dtype))


def _dropped(x: Tensor, weight: Adapted) -> Tensor:
    """What a multiplies: of all positions, or of this rank's if it has the whole weight; of all columns, or of this rank's."""
    if isinstance(weight.key, tuple):
        return x
    base = weight.base
    if not isinstance(base, Shard):
        return dropout(x, weight.dropout, weight.key, position_numbers(x[..., 0]))
    if base.dim is not None:
        columns = (base.axis.index, base.axis.size) if base.dim == 1 else (0, 1)
        return dropout(x, weight.dropout, weight.key, position_numbers(x[..., 0]), columns)
    whole = x.new_empty(x.shape[0], x.shape[1] * base.axis.size)
    return dropout(x, weight.dropout, weight.key, tensor_parallel.own_positions(position_numbers(whole), base.axis))


def gain(weight: Adapted) -> Tensor | None:
    """What DoRA multiplies the product by, [F]: magnitudes over the norms of the rows of W + scale · b a; None for LoRA.

    The norms are constants to the gradient (section 4.3).
    """
    if isinstance(weight.magnitude, tuple):
        return None
    merged = merge(own(weight.base).detach(), own(weight.a).detach(), own(weight.b).detach(), weight.scale)
    squares = merged.square().sum(1)
    if isinstance(weight.base, Shard) and weight.base.dim == 1:
        squares = tensor_parallel.sum_of_ranks(squares, weight.base.axis)
    return own(weight.magnitude) / squares.sqrt().detach()


def merge(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · b a, in float32 at least."""
    wide = base if base.dtype.itemsize > 4 else base.float()
    return wide + (b @ a).to(wide.dtype) * scale
