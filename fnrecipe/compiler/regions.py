"""Graphs within a traced graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule, Node


def graph_of(module: GraphModule, node: Node) -> GraphModule | None:
    """The graph of the region that `node` of the graph `module` calls, if it calls one."""
    called: Any = node.args[0] if node.target is invoke_subgraph else None
    return getattr(module, called.target) if called else None


def all_nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph, and in place of each call of a region those of its graph."""
    for node in module.graph.nodes:
        graph = graph_of(module, node)
        if graph is None:
            yield node
        else:
            yield from all_nodes(graph)
