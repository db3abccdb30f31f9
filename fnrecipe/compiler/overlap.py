"""A pass that reorders a traced graph so that collectives run while something else is computed. No value changes.

A collective is two operations, its start and the wait for its result; traced, they stand side by side. In the names here, a
gather is an all-gather of parameters, and a sum is a reduce-scatter, an all-reduce, or the all-to-all of an ordered sum.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from fnrecipe.compiler.alias import mutates
from fnrecipe.ops import fence

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


def has_collectives(module: GraphModule) -> bool:
    return bool(module.graph.find_nodes(op="call_function", target=_WAIT))


def overlap(module: GraphModule) -> None:
    """Starts each gather of parameters before the wait for the previous one, and each sum of gradients as soon as its inputs
    are computed; waits for each sum when the next one has started.

    So at any time one layer's full parameters more than needed are allocated, and one layer's gradients more.
    """
    # Why this cannot deadlock: a start never blocks, and the order of starts is the same on all ranks, because all ranks trace
    # the same program and the passes look at nothing but the graph. Take the first collective that is not complete. A rank
    # that waits for it or for a later one has started it; a rank that has not started it is waiting for nothing that is
    # incomplete, and gets there. (A heuristic by measured times, which differ between ranks, would lose this.)
    #
    # Why values stay the same: nodes move only within their data dependencies, and across no operation that writes into
    # memory that they read (see `_late_waits`).
    #
    # How far ahead: everything started at once holds every result twice (453 MB where one collective ahead holds 386 MB).
    #
    # Behind a fence ranks may have other programs: there each collective stays where it was called.
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    fences = module.graph.find_nodes(op="call_function", target=fence.default)
    first = nodes.index(fences[0]) if fences else len(nodes)
    movable, rest = nodes[:first], nodes[first:]
    sums = _sum_nodes(movable)
    for node in (*_late_waits(_early_sums(_early_gathers(movable), sums), sums), *rest):
        module.graph.output_node().prepend(node)
    for node in fences:
        module.graph.erase_node(node)
    module.recompile()


def _early_gathers(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each gather moved before the wait for the gather before it."""
    # Only gathers whose input is made of the graph's inputs by moving bytes can move: these could run at any place before
    # the parameters are updated, which is at the end. The gathers of the backward pass are among them, being gathers of the
    # same parameters. Their order among themselves stays.
    chains = [chain for node in nodes if node.target in _GATHERS and (chain := _gather_chain(node))]
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
    """The nodes, each node of a sum right behind the last of its inputs."""
    # Autograd runs the backward of what was applied first last: gradients that one function around all parameters sums are
    # traced behind the whole backward pass. The sort key of a moved node extends that of its last input, so it sorts behind
    # it and before everything that followed; the others keep their order.
    keys: dict[Node, tuple[int, ...]] = {}
    for number, node in enumerate(nodes):
        behind = max((keys[source] for source in node.all_input_nodes), default=()) if node in sums else ()
        keys[node] = (*behind, number)
    return sorted(nodes, key=keys.__getitem__)


def _sum_nodes(nodes: Sequence[Node]) -> set[Node]:
    """The sums over ranks, what lays out and adds up their inputs, their waits, and what adds up and gathers their results."""
    found, pending = set[Node](), [node for node in nodes if node.target in _SUMS]
    while pending:
        node = pending.pop()
        if node.target in _SUMS | _LAYOUT | _ADDS and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    for node in nodes:
        if (
            node.target in _LAYOUT | _ADDS | _GATHERS | {_WAIT}
            and node.all_input_nodes
            and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _gather_chain(gather: Node) -> list[Node]:
    """The nodes that lay out a gather's input, then the gather; empty if the input is not merely a layout of graph inputs."""
    found: dict[Node, None] = {}
    pending = [gather]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            continue
        if node is not gather and node.target not in _LAYOUT:
            return []
        found = {node: None, **found}
        pending += node.all_input_nodes
    return list(found)


def _late_waits(nodes: Sequence[Node], sums: set[Node]) -> Iterator[Node]:
    """The nodes, each wait for a sum held back, with all that depends on it, until the next sum has started."""
    # A node that writes into its arguments releases all held nodes first: one of them may read what it overwrites. (A gather
    # writes only into its own fresh output.) So updates in place still follow the last read of the old parameters.
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
    """The held nodes that may run now, and the rest."""
    # An ordered all-reduce is two collectives in a row: the wait for the all-to-all releases its additions and the start of
    # the gather of the result. The wait for that gather stays held, until the sum after the next one has started.
    released: dict[Node, None] = {}
    kept: dict[Node, None] = {}
    for node in held:
        waits = node.target == _WAIT and _depends(node, released)
        (kept if waits or _depends(node, kept) else released)[node] = None
    return released, kept


def _depends(node: Node, others: Container[Node]) -> bool:
    return any(source in others for source in node.all_input_nodes)
