"""Copies that are only there to be written into."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, base_allocation, is_new, mutated_base

aten = torch.ops.aten


def write_in_place(module: GraphModule) -> None:
    """Drops copies that are only there to be written into.

    `copy = clone(buffer); write(copy); buffer.copy_(copy)` becomes `write(buffer)`, and `copy = clone(value); write(copy)`
    becomes `write(value)`, if nothing reads the old value once `write` has begun.
    """
    order = {node: number for number, node in enumerate(module.graph.nodes)}

    def written_last(copy: Node, *others: Node) -> bool:
        (source,) = copy.all_input_nodes
        writes = [order[user] for user in copy.users if user not in others and user.op == "call_function"]
        reads = [order[user] for user in alias_users(*base_allocation(source)) if user not in (copy, *others)]
        same = copy.meta["val"].stride() == source.meta["val"].stride()
        return same and bool(writes) and max(reads, default=-1) < min(writes)

    for end in list(module.graph.find_nodes(op="call_function", target=aten.copy_.default)):
        buffer, copy = (mutated_base(arg) for arg in end.args)
        cloned = copy.target == aten.clone.default and copy.args[0] is buffer
        if buffer.op == "placeholder" and cloned and written_last(copy, end):
            for node in (end, copy):
                node.replace_all_uses_with(buffer)
                module.graph.erase_node(node)
    for copy in list(module.graph.find_nodes(op="call_function", target=aten.clone.default)):
        (source,) = copy.all_input_nodes
        if is_new(*base_allocation(source)) and written_last(copy):
            copy.replace_all_uses_with(source)
            module.graph.erase_node(copy)
    module.recompile()
