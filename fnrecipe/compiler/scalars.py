"""Numbers that all elements of a tensor need, such as a learning rate and what Adam divides by.

Inductor writes how a number is computed into each kernel that uses it, and there for each vector of elements: two powers in
float64 for every 16 elements took two fifths of the update of AdamW on a CPU.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, mutates
from fnrecipe.ops import opaque_clone


def materialize_scalars(module: GraphModule) -> None:
    """Has each number be there before tensors are combined with it, behind an operation that Inductor does not look into."""
    for node in [node for node in module.graph.nodes if _is_elementwise(node) and _is_scalar(node)]:
        users = [user for user in node.users if _is_elementwise(user) and not _is_scalar(user)]
        if users and not any(map(mutates, alias_users(node))):
            with module.graph.inserting_after(node):
                number = module.graph.call_function(opaque_clone.default, (node,))
            number.meta["val"] = node.meta["val"].clone()
            for user in users:
                user.replace_input_with(node, number)
    module.recompile()


def _is_elementwise(node: Node) -> bool:
    """Whether Inductor would write the operation into the kernels that use its result."""
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_scalar(node: Node) -> bool:
    return bool(node.meta["val"].dim() == 0)
