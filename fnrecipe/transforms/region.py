"""`region`: a function as a graph of its own in the traced graph that calls it: traced and compiled once for all calls.

It is what `jax.jit` within `jax.jit` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from fnrecipe.compiler.alias import storage
from fnrecipe.compiler.trace import trace
from fnrecipe.tree import Tree


def region(function: Callable[..., Tree], name: str) -> Callable[..., Tree]:
    """`function`, a pure function of trees of tensors that gets the same shapes at each call; its graph is called `name`.

    Outside of a trace, and under another transform, it is `function` itself.
    """
    traced: list[tuple[GraphModule, pytree.TreeSpec, list[int]]] = []

    def call(*args: Tree) -> Tree:
        mode: Any = get_proxy_mode()
        if mode is None or peek_interpreter_stack() is not None:
            return function(*args)
        with disable_proxy_modes_tracing():
            if not traced:
                graph, spec = trace(_apart(function), args)
                traced.append((graph, spec, _used_inputs(graph)))
                output: Any = graph.graph.output_node()
                output.update_arg(0, tuple(output.args[0]))  # torch 2.11 refuses a list
                mode.tracer.root.register_module(mode.tracer.get_fresh_qualname(name), traced[0][0])
            ((graph, spec, used),) = traced
            returned: Any = graph.graph.output_node().args[0]
            results = [torch.empty_like(result.meta["val"]) for result in returned]
        leaves = pytree.tree_leaves(args)
        operands = [mode.tracer.unwrap_proxy(leaves[number]) for number in used]
        node = mode.tracer.create_proxy("call_function", invoke_subgraph, (graph, name, *operands), {})
        return pytree.tree_unflatten(track_tensor_tree(results, node, constant=None, tracer=mode.tracer), spec)

    return call


def _used_inputs(graph: GraphModule) -> list[int]:
    """Which inputs the graph reads; it loses the others, so that what they are made of need not be there for its sake."""
    inputs = list(graph.graph.find_nodes(op="placeholder"))
    used = [number for number, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _apart(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`function`, each of whose results has memory of its own, as the results of an operation have."""

    def call(*args: Tree) -> Tree:
        results, spec = pytree.tree_flatten(function(*args))
        return pytree.tree_unflatten(list(_copied(results, pytree.tree_leaves(args))), spec)

    return call


def _copied(values: Iterable[Tensor], others: Iterable[Tensor]) -> Iterator[Tensor]:
    taken = {storage(other) for other in others}
    for value in values:
        # Callers take the result to be laid out as a new tensor; a gradient may be one number, expanded.
        if storage(value) in taken or torch.empty_like(value).stride() != value.stride():
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(storage(value))
        yield value
