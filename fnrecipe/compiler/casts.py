"""A pass that drops casts to a wider dtype and back, which are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, base_allocation, is_new, mutates

cast = torch.ops.aten._to_copy.default


def drop_round_trips(module: GraphModule) -> None:
    """Replaces `narrow(wide(value))` by `value` wherever a traced graph reads it.

    So a function may treat parameters in half precision as float32 (their gradients then are float32), and no float32 copy
    of them is ever allocated.
    """
    for node in module.graph.find_nodes(op="call_function", target=cast):
        (wide,) = node.all_input_nodes
        if wide.target == cast and _is_round_trip(wide.all_input_nodes[0], wide, node):
            node.replace_all_uses_with(wide.all_input_nodes[0])
            module.graph.erase_node(node)


def is_widening(node: Node) -> bool:
    """Whether the operation casts a tensor to the dtype that both promote to, and does nothing else."""
    if node.target != cast or not node.kwargs.keys() <= {"dtype", "layout", "device"}:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    same = (before.device, before.layout, before.stride()) == (after.device, after.layout, after.stride())
    return same and torch.promote_types(before.dtype, after.dtype) == after.dtype


def _is_round_trip(source: Node, wide: Node, narrow: Node) -> bool:
    # Widening is exact if the wider dtype is what both promote to: bfloat16 -> float32 -> bfloat16 is, bfloat16 -> float16 ->
    # bfloat16 is not. The narrow copy was memory of its own: where it is written into, or is an output of the graph, its
    # readers must not be given the source instead. (The cast to the wider dtype, if nobody else reads it, is dead code now.)
    before, between, after = (node.meta["val"] for node in (source, wide, narrow))
    same = _layout(before) == _layout(after) and torch.promote_types(before.dtype, between.dtype) == between.dtype
    return same and is_new(*base_allocation(narrow)) and not any(map(mutates, alias_users(narrow)))


def _layout(value: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return value.dtype, value.device, value.stride()
