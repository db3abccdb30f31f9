"""Casts to a wider dtype and back, which change nothing, and need not be done."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, base_allocation, is_new, mutates

cast = torch.ops.aten._to_copy.default


def drop_round_trips(module: GraphModule) -> None:
    """Reads a value itself where a traced graph reads what is left of it after it was widened and narrowed again.

    So a function may treat parameters in half precision as if they were wide, and no wide copy of them is ever made.
    """
    for node in module.graph.find_nodes(op="call_function", target=cast):
        (wide,) = node.all_input_nodes
        if wide.target == cast and _is_round_trip(wide.all_input_nodes[0], wide, node):
            node.replace_all_uses_with(wide.all_input_nodes[0])
            module.graph.erase_node(node)


def _is_round_trip(source: Node, wide: Node, narrow: Node) -> bool:
    before, between, after = (node.meta["val"] for node in (source, wide, narrow))
    same = _layout(before) == _layout(after) and torch.promote_types(before.dtype, between.dtype) == between.dtype
    return same and is_new(*base_allocation(narrow)) and not any(map(mutates, alias_users(narrow)))


def _layout(value: Any) -> Any:
    return value.dtype, value.device, value.stride()
