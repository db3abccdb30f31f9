"""What the operations of a traced graph write into, and what their results share with their arguments."""

from __future__ import annotations

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


def readers(node: Node) -> Iterator[Node]:
    """The operations that look at the value of `node`, also those that do so through a view of it."""
    for user in node.users:
        if user.op == "call_function":
            yield user
            if _aliases(user):
                yield from readers(user)


def _aliases(node: Node) -> list[Any]:
    """What a node's results share with its arguments; nothing if they are new."""
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else []
    return [result.alias_info for result in returns if result.alias_info is not None]
