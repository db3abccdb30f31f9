"""Regions: graphs within a traced graph, each traced once and called at several places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule, Node

INLINE = "inline"
"""The key of a region's `meta`: whether `inline` replaces its calls."""


def graph_of(module: GraphModule, node: Node) -> GraphModule | None:
    """The graph of the region that `node` of the graph `module` calls; None if it calls none."""
    attribute = node.args[0] if node.target is invoke_subgraph else None
    return getattr(module, str(attribute.target)) if isinstance(attribute, Node) else None


def all_nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph, each call of a region replaced by the nodes of the region's graph."""
    for node in module.graph.nodes:
        graph = graph_of(module, node)
        if graph is None:
            yield node
        else:
            yield from all_nodes(graph)


def inline(module: GraphModule) -> None:
    """Replaces the calls of regions whose `meta` says so by the regions' operations, here and in all other regions.

    A call holds its operands until it returns; operation by operation, each is freed after its last use.
    """
    calls = [(node, region) for node in module.graph.nodes if (region := graph_of(module, node))]
    for region in dict.fromkeys(region for _, region in calls):
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
    copies = dict(zip(region.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with module.graph.inserting_before(call):
        for attribute in region.graph.find_nodes(op="get_attr"):
            name = f"{call.name}_{attribute.target}"
            setattr(module, name, getattr(region, str(attribute.target)))
            copies[attribute] = module.graph.get_attr(name)
        results = module.graph.graph_copy(region.graph, copies)
    assert isinstance(results, Sequence)
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])
        module.graph.erase_node(item)
    module.graph.erase_node(call)
