"""What the operations of a traced graph write into, and what their results share with their arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node


def written(node: Any) -> Node:
    """The value that `node` has written into and given back, if that is its first argument, or else `node`."""
    arguments = node.target._schema.arguments if isinstance(node.target, OpOverload) else []
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in arguments[:1])
    return written(node.args[0]) if writes else node


def mutates(node: Node) -> bool:
    """Whether the operation writes into any of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def is_new(node: Any) -> bool:
    """Whether the value of `node` lies in memory of its own that no result of the graph looks into."""
    return isinstance(node, Node) and isinstance(node.target, OpOverload) and not _looks(node) and not _is_result(node)


def readers(node: Node) -> Iterator[Node]:
    """The operations that look at the value of `node`, also those that do so through a view of it."""
    for user in node.users:
        if user.op == "call_function":
            yield user
            if _looks(user):
                yield from readers(user)


def _is_result(node: Node) -> bool:
    return any(user.op == "output" or (_looks(user) and _is_result(user)) for user in node.users)


def _looks(node: Node) -> bool:
    """Whether what the operation gives shares memory with its arguments."""
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else []
    return node.target is operator.getitem or any(result.alias_info is not None for result in returns)
