"""Regions: graphs within a traced graph, each traced once and called at several places."""

from __future__ import annotations

from collections.abc import Iterator

from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule, Node


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
