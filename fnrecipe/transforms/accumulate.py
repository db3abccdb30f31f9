"""Sum a function over the microbatches of a batch, in an order that does not depend on who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.tree import Tree

Add: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def accumulate(
    function: Callable[[Tree, Tree], Tree], num_microbatches: int, add: Add = torch.add
) -> Callable[[Tree, Tree], Tree]:
    """`function(params, microbatch)` summed over the `num_microbatches` equal parts that the rows of a batch are cut into.

    The sum is the balanced binary tree over neighbouring microbatches, for `num_microbatches` a power of two: any rank that
    holds a power-of-two run of them computes a subtree of it. Partial sums are kept as a carry-save counter keeps its digits,
    so at most log2(num_microbatches) + 1 results live at once.
    """

    def summed(params: Tree, batch: Tree) -> Tree:
        digits: list[tuple[int, Tree]] = []
        for index in range(num_microbatches):
            value, size = function(params, _microbatch(batch, index, num_microbatches)), 1
            while digits and digits[-1][0] == size:
                value, size = tree.map(add, digits.pop()[1], value), 2 * size
            digits.append((size, value))
        ((_, total),) = digits
        return total

    return summed


def _microbatch(batch: Tree, index: int, num_microbatches: int) -> Tree:
    def part(rows: Tensor) -> Tensor:
        size, rest = divmod(rows.shape[0], num_microbatches)
        if rest:
            raise ValueError(f"accumulate: expected a multiple of {num_microbatches} rows, found {rows.shape[0]}")
        return rows[index * size : (index + 1) * size]

    return tree.map(part, batch)
