"""A pass that gives the result of an elementwise operation the memory of an operand which nobody reads any more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import alias_users, base_allocation, is_new

aten = torch.ops.aten

_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def reuse_memory(module: GraphModule) -> None:
    """Makes `a + b` into `a.add_(b)`, and so on, where `a` is a value of the graph and is read by no later operation.

    The order of the operations is the one in which they run: no pass may move any behind this one.
    """
    # Memory that was just written is in the cache, fresh memory is not; and the two gradients of a tied embedding, say, are not
    # there three times, with their sum.
    order = {node: number for number, node in enumerate(module.graph.nodes)}
    for node in order:
        in_place = _in_place(node.target)
        if in_place is None or not node.args:
            continue
        swapped = (node.args[1], node.args[0], *node.args[2:]) if _commutes(node) else node.args
        for args in dict.fromkeys((node.args, swapped)):
            if isinstance(args[0], Node) and _is_free(args[0], node, order):
                node.target, node.args = in_place, args
                break
    module.recompile()


def _in_place(target: object) -> OpOverload | None:
    """The operation that writes what `target` computes element by element into its first argument."""
    if not isinstance(target, OpOverload) or torch.Tag.pointwise not in target.tags or target._schema.is_mutable:
        return None
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    return getattr(packet, target._overloadname, None)


def _commutes(node: Node) -> bool:
    return node.target in _COMMUTATIVE and not node.kwargs and isinstance(node.args[1], Node)


def _is_free(operand: Node, node: Node, order: dict[Node, int]) -> bool:
    """Whether the operand's memory can hold the node's result: it is laid out alike, and nothing else or later reads it."""
    before, after = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    # (A result is allocated dense and without overlap, so an operand of its strides is that, too.)
    if (before.dtype, before.shape, before.stride()) != (after.dtype, after.shape, after.stride()):
        return False
    base, disjoint = base_allocation(operand)
    others = [other for other in node.all_input_nodes if other is not operand]
    if not is_new(base, disjoint) or any(base_allocation(other)[0] is base for other in others):
        return False
    return all(order[user] <= order[node] for user in alias_users(base, disjoint))
