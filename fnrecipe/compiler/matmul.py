"""A pass that computes large float32 matrix products on a CPU by oneDNN: 5 to 10 % faster than MKL on an AMD Zen 4."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.ops import is_large_product, mm

aten = torch.ops.aten

COPIED_EAGERLY, COPIED_BY_A_KERNEL = 900, 256
"""Multiplications that must stand against each element copied from a transposed view, by torch or by a compiled kernel."""


def use_onednn_matmul(module: GraphModule, worth: int = COPIED_EAGERLY) -> None:
    """Replaces `aten.mm` by `fnrecipe::mm` where that pays. Results are equal within rounding.

    A copy pays if there are `worth` multiplications for each element copied.
    """
    # torch multiplies float32 by MKL (90 to 100 GFLOP/s a core, oneDNN 105 to 110) and has oneDNN for it only behind
    # `mkldnn._linear_pointwise`, a layer for inference; `fnrecipe::mm` wraps that. oneDNN copies a left matrix that is a
    # transposed view, as in every weight's gradient. A copied element takes 0.7 ns by torch and 0.25 in a kernel of Inductor's,
    # a multiplication by oneDNN saves 0.0022: the copy breaks even at 320 or 114 multiplications an element, and is asked to
    # pay two to three times. Turned round, left right = (rightᵀ leftᵀ)ᵀ, a product may need the smaller copy: the gradient of
    # a head with a large vocabulary copies 2.4 instead of 8.4 million elements. Also tried: a 1 x 1 convolution, whose
    # backward is MKL again.
    for node in module.graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        multiplications = math.prod(left.shape) * right.shape[1]
        if not (is_large_product(left, right.t()) and _dense(left, right)):
            continue
        straight = _copied(left)
        turned = _copied(right.t()) + left.shape[0] * right.shape[1]
        if multiplications >= worth * min(straight, turned):
            with module.graph.inserting_before(node):
                product = _straight(*node.args) if straight <= turned else _turned(*node.args)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()


def _dense(*matrices: Tensor) -> bool:
    return all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in matrices)


def _copied(left: Tensor) -> int:
    """Elements that are copied before `left` can be the left matrix of a product."""
    return 0 if left.is_contiguous() else left.numel()


def _straight(left: Node, right: Node) -> Node:
    return _call(mm.default, _contiguous(left), right)


def _turned(left: Node, right: Node) -> Node:
    product = _straight(_call(aten.t.default, right), _call(aten.t.default, left))
    return _contiguous(_call(aten.t.default, product))


def _contiguous(matrix: Node) -> Node:
    """The matrix in row-major order; itself if it is that already."""
    if matrix.meta["val"].is_contiguous():
        return matrix
    copy = _call(aten.clone.default, matrix)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    copy.meta["val"] = matrix.meta["val"].contiguous()
    return copy


def _call(target: Callable[..., Tensor], *args: Node) -> Node:
    """A node that calls `target`, at the insertion point of its arguments' graph."""
    node = args[0].graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] for arg in args))
    return node
