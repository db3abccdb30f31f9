"""The order of a traced graph in which collectives run while something else is computed. Values and bits stay the same.

A collective is two operations: its start, and the wait for its result. As traced, they stand side by side.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import mutates

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

_WAIT = c10d.wait_tensor.default
_GATHERS = {c10d.all_gather_into_tensor_out.default}
_SUMS = {c10d.all_to_all_single.default, c10d.reduce_scatter_tensor.default, c10d.all_reduce.default}
_LAYOUT = {
    *(aten.cat.default, aten.stack.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem),
    *(aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.slice.Tensor),
    *(aten._to_copy.default, aten.clone.default, aten.constant_pad_nd.default, aten.new_empty.default),
}
_ADDS = {aten.add.Tensor}


def overlap(module: GraphModule) -> None:
    """Starts each gather of parameters before the wait for the one before it, and each sum of gradients as soon as these are
    there; waits for each sum when the next one is started.

    So at any time the parameters of one layer more than needed are whole, and the gradients of one layer more.
    """
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    sums = _of_sums(nodes)
    for node in _late_waits(_early_sums(_early_gathers(nodes), sums), sums):
        module.graph.output_node().prepend(node)
    module.recompile()


def _early_gathers(nodes: Sequence[Node]) -> list[Node]:
    chains = [chain for node in nodes if node.target in _GATHERS and (chain := _chain(node))]
    waits = [next(user for user in chain[-1].users if user.target == _WAIT) for chain in chains]
    before = dict(zip(waits, chains[1:], strict=False))
    moved = {node for chain in chains[1:] for node in chain}

    def order() -> Iterator[Node]:
        for node in nodes:
            yield from before.get(node, [])
            if node not in moved:
                yield node

    return list(order())


def _early_sums(nodes: Sequence[Node], sums: set[Node]) -> list[Node]:
    """The nodes, those of sums each right behind the last of the nodes that it needs."""
    places: dict[Node, tuple[int, ...]] = {}
    for number, node in enumerate(nodes):
        behind = max((places[source] for source in node.all_input_nodes), default=()) if node in sums else ()
        places[node] = (*behind, number)
    return sorted(nodes, key=places.__getitem__)


def _of_sums(nodes: Sequence[Node]) -> set[Node]:
    """The sums over ranks, what adds up and lays out their inputs, the waits for them, and what adds up and gathers results."""
    found, waiting = set[Node](), [node for node in nodes if node.target in _SUMS]
    while waiting:
        node = waiting.pop()
        if node.target in _SUMS | _LAYOUT | _ADDS and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    for node in nodes:
        if (
            node.target in _LAYOUT | _ADDS | _GATHERS | {_WAIT}
            and node.all_input_nodes
            and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _chain(gather: Node) -> list[Node]:
    """The gather behind what lays out its input, if that is made of the graph's inputs by moving bytes only; else empty."""
    found: dict[Node, None] = {}
    waiting = [gather]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            continue
        if node is not gather and node.target not in _LAYOUT:
            return []
        found = {node: None, **found}
        waiting += node.all_input_nodes
    return list(found)


def _late_waits(nodes: Sequence[Node], sums: set[Node]) -> Iterator[Node]:
    """The nodes, each wait for a sum held back, with all that depends on it, until the next sum is started."""
    held: dict[Node, None] = {}
    for node in nodes:
        if mutates(node) and node.target not in _GATHERS:
            yield from held
            held = {}
        elif _depends(node, held) or (node.target == _WAIT and node in sums):
            held[node] = None
            continue
        yield node
        if node.target in _SUMS:
            released, held = _released(held)
            yield from released
    yield from held


def _released(held: Iterable[Node]) -> tuple[dict[Node, None], dict[Node, None]]:
    """What is held, up to the waits for exchanges that this starts; and the rest."""
    released: dict[Node, None] = {}
    kept: dict[Node, None] = {}
    for node in held:
        waits = node.target == _WAIT and _depends(node, released)
        (kept if waits or _depends(node, kept) else released)[node] = None
    return released, kept


def _depends(node: Node, others: Container[Node]) -> bool:
    return any(source in others for source in node.all_input_nodes)
