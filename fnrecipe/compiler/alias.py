"""What the operations of a traced graph write into, and what their results share with their arguments."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef


def storage(tensor: Tensor) -> StorageWeakRef:
    """What tensors that share memory have in common."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def mutated_base(node: Any) -> Node:
    """The value that `node` has written into and given back, if that is its first argument, or else `node`."""
    arguments = node.target._schema.arguments if isinstance(node.target, OpOverload) else []
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in arguments[:1])
    return mutated_base(node.args[0]) if writes else node


def mutates(node: Node) -> bool:
    """Whether the operation writes into any of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def base_allocation(node: Node) -> tuple[Node, set[Node]]:
    """The operation that made the memory that the value of `node` lies in, and those of its pieces that do not overlap it."""
    apart = set[Node]()
    while _is_view(node):
        (parent, *_) = node.all_input_nodes
        if node.target is operator.getitem:
            apart |= {piece for piece in parent.users if piece.target is operator.getitem and piece.args[1] != node.args[1]}
        node = parent
    return node, apart


def is_new(node: Node, apart: Container[Node] = ()) -> bool:
    """Whether the operation makes memory that no result of the graph looks into, but for what looks through `apart`."""
    return node.op == "call_function" and not _is_result(node, apart)


def alias_users(node: Node, apart: Container[Node] = ()) -> Iterator[Node]:
    """The operations that look at the value of `node`, also those that do so through a view of it, but not through `apart`."""
    for user in node.users:
        if user.op == "call_function" and user not in apart:
            yield user
            if _is_view(user):
                yield from alias_users(user, apart)


def _is_result(node: Node, apart: Container[Node]) -> bool:
    users = (user for user in node.users if user not in apart)
    return any(user.op == "output" or (_is_view(user) and _is_result(user, apart)) for user in users)


def _is_view(node: Node) -> bool:
    """Whether what the operation gives shares memory with its arguments."""
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else []
    return node.target is operator.getitem or any(result.alias_info is not None for result in returns)
