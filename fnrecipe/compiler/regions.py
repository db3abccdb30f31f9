"""Regions: graphs within a traced graph, each traced once and called at several places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule, Node

INLINE = "inline"
"""The key of a region's `meta`: whether `inline` replaces its calls."""


def graph_of(module: GraphModule, node: Node) -> GraphModule | None:
    """The graph of the region that `node` of the graph `module` calls; None if it calls none."""
    attribute = node.args[0] if node.target is invoke_subgraph else None
    return getattr(module, str(attribute.target)) if isinstance(attribute, Node) else None


def regions_of(module: GraphModule) -> Sequence[GraphModule]:
    """The regions that a graph calls, each of them once."""
    return tuple(dict.fromkeys(region for node in module.graph.nodes if (region := graph_of(module, node))))


def results_of(module: GraphModule) -> Sequence[Node]:
    """The nodes whose values the graph returns, each of them a tensor."""
    results: Any = module.graph.output_node().args[0]
    return tuple(results)


def all_nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph, each call of a region replaced by the nodes of the region's graph."""
    for node in module.graph.nodes:
        graph = graph_of(module, node)
        if graph is None:
            yield node
        else:
            yield from all_nodes(graph)


def name_calls(module: GraphModule) -> None:
    """Gives the calls of each region a name that no other's have: torch's compiler takes regions for one if they share it."""
    for path, part in module.named_modules():
        for node in part.graph.find_nodes(op="call_function", target=invoke_subgraph) if isinstance(part, GraphModule) else ():
            attribute, _, *operands = node.args
            node.args = (attribute, f"{path}.{attribute.target}", *operands)


def inline(module: GraphModule) -> None:
    """Replaces the calls of regions whose `meta` says so by the regions' operations, here and in all other regions.

    A call holds its operands until it returns; operation by operation, each is freed after its last use.
    """
    calls = [(node, region) for node in module.graph.nodes if (region := graph_of(module, node))]
    for region in regions_of(module):
        inline(region)
    inlined = [(node, region) for node, region in calls if region.meta.get(INLINE)]
    for call, region in inlined:
        _write_out(module, call, region)
    if inlined:
        module.graph.eliminate_dead_code()  # the attributes that were the regions
        module.delete_all_unused_submodules()
        module.recompile()


def _write_out(module: GraphModule, call: Node, region: GraphModule) -> None:
    """Replaces the call, whose results are read by `getitem` only."""
    copies: dict[Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with module.graph.inserting_before(call):
        for attribute in region.graph.find_nodes(op="get_attr"):
            name, value = f"{call.name}_{attribute.target}", getattr(region, str(attribute.target))
            if isinstance(value, Tensor):
                module.register_buffer(name, value)
            else:
                module.register_module(name, value)
            copies[attribute] = module.graph.get_attr(name)
        results: Any = module.graph.graph_copy(region.graph, copies)
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])
        module.graph.erase_node(item)
    module.graph.erase_node(call)
