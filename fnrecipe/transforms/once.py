"""Numbers that all elements of a tensor need, such as a learning rate and what Adam divides by.

Inductor writes how a number is computed into each kernel that uses it, and there for each vector of elements: two powers in
float64 for every 16 elements took four fifths of the update of AdamW on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.transforms.alias import mutates, readers

torch.library.define("fnrecipe::once", "(Tensor number) -> Tensor")
torch.library.impl("fnrecipe::once", "CompositeExplicitAutograd", torch.clone)
torch.library.register_fake("fnrecipe::once", torch.empty_like)
once = torch.ops.fnrecipe.once


def numbers_once(module: GraphModule) -> None:
    """Has each number be there before a tensor is combined with it, behind an operation that Inductor does not look into."""
    for node in [node for node in module.graph.nodes if _is_computed(node)]:
        users = [user for user in node.users if user.op == "call_function" and not _is_number(user)]
        if users:
            with module.graph.inserting_after(node):
                number = module.graph.call_function(once.default, (node,))
            number.meta["val"] = node.meta["val"].clone()
            for user in users:
                user.replace_input_with(node, number)
    module.recompile()


def _is_computed(node: Node) -> bool:
    """Whether the node computes a number out of others, and nothing writes into that later."""
    constant = all(source.op == "get_attr" for source in node.all_input_nodes)
    computed = node.op == "call_function" and _is_number(node) and not constant
    return computed and not any(map(mutates, readers(node)))


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0
