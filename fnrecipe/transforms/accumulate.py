"""Sum a function over the leaves (micro-batches) of a batch, in an order that does not depend on who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from fnrecipe import tree
from fnrecipe.tree import Tree

Add: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def accumulate(function: Callable[[Tree, Any], Tree], num_leaves: int, add: Add = torch.add) -> Callable[[Tree, Any], Tree]:
    """`function(params, leaf)` summed over the `num_leaves` equal parts that the rows of a batch are cut into.

    The sum is the balanced binary tree over neighbouring leaves, for `num_leaves` a power of two: any rank that holds a
    power-of-two run of leaves computes a subtree of it. Partial sums are kept as a carry-save counter keeps its digits,
    so at most log2(num_leaves) + 1 results live at once.
    """

    def summed(params: Tree, batch: Any) -> Tree:
        digits: list[tuple[int, Tree]] = []
        for index in range(num_leaves):
            value, size = function(params, _leaf(batch, index, num_leaves)), 1
            while digits and digits[-1][0] == size:
                value, size = tree.map(add, digits.pop()[1], value), 2 * size
            digits.append((size, value))
        ((_, total),) = digits
        return total

    return summed


def _leaf(batch: Any, index: int, num_leaves: int) -> Any:
    def part(rows: Any) -> Any:
        size, rest = divmod(rows.shape[0], num_leaves)
        if rest:
            raise ValueError(f"accumulate: expected a multiple of {num_leaves} rows, found {rows.shape[0]}")
        return rows[index * size : (index + 1) * size]

    return tree.map(part, batch)
