"""Large float32 matrix products on a CPU by oneDNN: on an AMD Zen 4 it is 5 to 10 % faster than MKL, which torch calls.

torch has oneDNN for this precision only behind a fused layer for inference, so here is an operation of our own around that.
It copies a left matrix that is a transposed view, as in the gradient of each weight, which costs more than it gains unless
the product is large; so the product may be turned round for a smaller copy, `left right = (rightᵀ leftᵀ)ᵀ`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.ops import mm

aten = torch.ops.aten

_LEAST = 2**25
"""Multiplications of the smallest product for which that pays: our operation takes 25 microseconds more to call."""

COPIED_EAGERLY, COPIED_BY_A_KERNEL = 900, 256
"""Multiplications for which a number may be copied from a transposed view: by torch, which takes 0.7 ns, or by a compiled
kernel, which takes 0.25."""


def use_onednn_matmul(module: GraphModule, worth: int = COPIED_EAGERLY) -> None:
    """Has oneDNN multiply where it pays. The results are equal within rounding.

    A copy pays if there are `worth` multiplications for each of its numbers.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for node in module.graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        multiplications = math.prod(left.shape) * right.shape[1]
        if multiplications < _LEAST or (left.device.type, left.dtype) != ("cpu", torch.float32) or not _dense(left, right):
            continue
        straight = _copies(left)
        turned = _copies(right.t()) + left.shape[0] * right.shape[1]
        if multiplications >= worth * min(straight, turned):
            with module.graph.inserting_before(node):
                product = _straight(*node.args) if straight <= turned else _transposed(*node.args)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()


def _dense(*matrices: Tensor) -> bool:
    return all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in matrices)


def _copies(left: Tensor) -> int:
    """Numbers that are copied before `left` can be the left matrix of a product."""
    return 0 if left.is_contiguous() else left.numel()


def _straight(left: Node, right: Node) -> Node:
    return _call(mm.default, _contiguous(left), right)


def _transposed(left: Node, right: Node) -> Node:
    product = _straight(_call(aten.t.default, right), _call(aten.t.default, left))
    return _contiguous(_call(aten.t.default, product))


def _contiguous(matrix: Node) -> Node:
    """The matrix row after row; itself if it is that."""
    if matrix.meta["val"].is_contiguous():
        return matrix
    copy = _call(aten.clone.default, matrix)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    copy.meta["val"] = matrix.meta["val"].contiguous()
    return copy


def _call(target: Callable[..., Tensor], *args: Node) -> Node:
    """A node for an operation, in the graph of its arguments, where that is being written."""
    node = args[0].graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] for arg in args))
    return node
