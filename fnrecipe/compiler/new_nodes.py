"""Nodes that passes add to a graph, each with what it gives in its `meta`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, map_arg


def call(target: Callable[..., Tensor], *args: Argument) -> Node:
    """A node that calls `target`, at the insertion point of its arguments' graph."""
    nodes = list[Node]()
    map_arg(args, nodes.append)
    node = nodes[0].graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda each: each.meta["val"]))
    return node


def contiguous_copy(matrix: Node) -> Node:
    """A copy of the matrix in row-major order."""
    copy = call(torch.ops.aten.clone.default, matrix)
    copy.update_kwarg("memory_format", torch.contiguous_format)
    copy.meta["val"] = matrix.meta["val"].contiguous()
    return copy
