"""Alias analysis of a traced graph: which operations write into their arguments, and which values share memory."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator

import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument
from torch.multiprocessing.reductions import StorageWeakRef

# Everything here follows from the operators' schemas: `(a)` marks a result as a view of an argument, `(a!)` marks an argument
# as written. An operator outside of torch's dispatcher (`getitem`, on the list that a `split` returns) counts as a view. The
# analysis must never call two values distinct that share memory; the other way round it may err, and only costs a copy.


def storage(tensor: Tensor) -> StorageWeakRef:
    """The identity of a tensor's storage: equal for tensors that share memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def mutated_base(node: Argument) -> Node:
    """The value that a chain of in-place operations ending in `node` writes into; `node` itself if it is none of these."""
    assert isinstance(node, Node)
    arguments = node.target._schema.arguments if isinstance(node.target, OpOverload) else []
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in arguments[:1])
    return mutated_base(node.args[0]) if writes else node


def mutates(node: Node) -> bool:
    """Whether the operation writes into any of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def base_allocation(node: Node) -> tuple[Node, set[Node]]:
    """The operation that allocated the memory of `node`'s value, and the pieces of it that do not overlap that value."""
    # Walk up through views to the allocation. The pieces of a `split` are disjoint: a read of a sibling is no read of this
    # value. Gradients that come out of one bucket of a collective are such pieces, and each of them may be written in place.
    disjoint = set[Node]()
    while _is_view(node):
        (parent, *_) = node.all_input_nodes
        if node.target is operator.getitem:
            disjoint |= {other for other in parent.users if other.target is operator.getitem and other.args[1] != node.args[1]}
        node = parent
    return node, disjoint


def is_new(node: Node, disjoint: Container[Node] = ()) -> bool:
    """Whether the operation allocates memory that no output of the graph aliases, other than through `disjoint` pieces."""
    return node.op == "call_function" and not _is_output(node, disjoint)


def alias_users(node: Node, disjoint: Container[Node] = ()) -> Iterator[Node]:
    """The operations that read or write the memory of `node`, directly or through a view, but not through `disjoint` pieces."""
    for user in node.users:
        if user.op == "call_function" and user not in disjoint:
            yield user
            if _is_view(user):
                yield from alias_users(user, disjoint)


def is_written(node: Node, disjoint: Container[Node] = ()) -> bool:
    """Whether an operation writes into the memory of `node`, directly or through a view, but not through `disjoint` pieces."""
    users = [user for user in node.users if user.op == "call_function" and user not in disjoint]
    return any(_writes_into(user, node) or (_is_view(user) and is_written(user)) for user in users)


def _writes_into(user: Node, node: Node) -> bool:
    """Whether the operation writes into an argument that is `node`, or is a list with it."""
    if not mutates(user):
        return False
    assert isinstance(user.target, OpOverload)
    arguments = user.target._schema.arguments
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    given = dict(zip((argument.name for argument in arguments), user.args, strict=False)) | user.kwargs
    return node in pytree.tree_leaves([given[name] for name in written if name in given])


def _is_output(node: Node, disjoint: Container[Node]) -> bool:
    users = (user for user in node.users if user not in disjoint)
    return any(user.op == "output" or (_is_view(user) and _is_output(user, disjoint)) for user in users)


def _is_view(node: Node) -> bool:
    """Whether the operation's result shares memory with its arguments."""
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else []
    return node.target is operator.getitem or any(result.alias_info is not None for result in returns)
