"""A pass that computes 0-d values (a learning rate, a bias correction) once, outside of the kernels that broadcast them."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import is_written
from fnrecipe.ops import opaque_clone


def materialize_scalars(module: GraphModule) -> None:
    """Materialises each 0-d value before fused kernels broadcast it, behind an operation that is opaque to Inductor."""
    # Inductor inlines cheap producers into their consumers, and takes every 0-d value for cheap: AdamW's loop computed two
    # powers in float64 for each vector of 16 elements, two fifths of its time (24 ms of a step of 800 on a CPU; now 15). What
    # it cannot look into it cannot inline. Consumers that are 0-d themselves keep the original, so that chains of scalar
    # arithmetic still fuse. A value that is written into later must not be read from a copy.
    for node in [node for node in module.graph.nodes if _is_elementwise(node) and _is_scalar(node)]:
        users = [user for user in node.users if _is_elementwise(user) and not _is_scalar(user)]
        if users and not is_written(node):
            with module.graph.inserting_after(node):
                scalar = module.graph.call_function(opaque_clone.default, (node,))
            scalar.meta["val"] = node.meta["val"].clone()
            for user in users:
                user.replace_input_with(node, scalar)
    module.recompile()


def _is_elementwise(node: Node) -> bool:
    """Whether Inductor would inline the operation into the kernels that read its result."""
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_scalar(node: Node) -> bool:
    return bool(node.meta["val"].dim() == 0)
