"""Passes that drop casts to a wider dtype, which are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import base_allocation, is_new, is_written
from fnrecipe.ops import adamw, norms

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


def read_narrow(module: GraphModule) -> None:
    """Gives norms and AdamW's kernel the values before a cast to a wider dtype, in which they compute all the same.

    So no gradient is written in float32 that comes in bfloat16, and the cast is gone: 0.7 ms of the 33 of a step of 124M
    parameters on a GPU. Results are equal within rounding.
    """
    for node in module.graph.find_nodes(op="call_function", target=norms.default):
        tensors, *others = node.args
        node.args = [_before_widening(tensor) for tensor in tensors], *others
    for node in module.graph.find_nodes(op="call_function", target=adamw.default):
        params, gradients, *others = node.args
        node.args = params, [_before_widening(gradient) for gradient in gradients], *others
    module.graph.eliminate_dead_code()
    module.recompile()


def _before_widening(node: Node) -> Node:
    if not is_widening(node):
        return node
    (source,) = node.all_input_nodes
    written = is_new(*base_allocation(node)) and is_written(node)
    return node if written or is_written(*base_allocation(source)) else source


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
    return same and is_new(*base_allocation(narrow)) and not is_written(narrow)


def _layout(value: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return value.dtype, value.device, value.stride()
