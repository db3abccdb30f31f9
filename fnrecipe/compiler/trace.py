"""Tracing: a function of trees of tensors as a flat graph of aten operations, after all passes that keep its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import tree
from fnrecipe.compiler.alias import storage
from fnrecipe.compiler.casts import drop_round_trips
from fnrecipe.compiler.in_place import write_in_place
from fnrecipe.compiler.overlap import has_collectives, overlap
from fnrecipe.compiler.products import Choose, by_rule, choose_kernels
from fnrecipe.compiler.pure import Refusal
from fnrecipe.compiler.regions import inline
from fnrecipe.compiler.reuse import reuse_memory
from fnrecipe.tree import Tree

Run: TypeAlias = Callable[..., Sequence[Tensor]]
"""A graph as a function of its flat inputs: it returns the flat outputs, and writes into donated inputs."""

Backend: TypeAlias = Callable[[GraphModule], Run]
"""What runs a graph."""


def interpreter(graph: GraphModule, choose: Choose = by_rule) -> Run:
    """The graph as it is: one operation after the other, but for what `choose` says of its matrix products.

    Changes `graph`: regions that may be inlined are.
    """
    inline(graph)
    write_in_place(graph)  # what regions write into copies of
    choose_kernels(graph, choose)
    reuse_memory(graph)
    return graph


def trace(
    function: Callable[..., Tree], args: tuple[Tree, ...], *, donate: int = 0, fixed: int = 0
) -> tuple[GraphModule, pytree.TreeSpec]:
    """The graph that `jit` runs for `args`, from their leaves to the results' leaves, and the structure of the results.

    The args may be fake tensors; each node's result is one in its `meta["val"]`. The graph's `meta["donated"]` is the number
    of its first inputs that are donated, `meta["fixed"]` of those that every call finds at the same addresses.

    Raises:
        UsageError: if the function draws from a global generator, or looks at a number of a tensor.
    """
    inputs, spec = pytree.tree_flatten(args)
    num_donated = len(tree.leaves(args[:donate]))
    results: list[pytree.TreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        outputs, result = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), spec)))
        results.append(result)
        return _donated(leaves[:num_donated], outputs)

    graph = record(flat, inputs)
    rewrite(graph)
    for part in graph.modules():  # a backend may be one of torch's, which would not run what is not written yet
        if isinstance(part, _LazyGraphModule):
            part.real_recompile()
    graph.meta["donated"] = num_donated
    graph.meta["fixed"] = len(tree.leaves(args[: max(donate, fixed)]))
    return graph, results[0]


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """The operations of a function of tensors in the order in which they were called, but those whose results nobody reads."""

    def guarded(*leaves: Tensor) -> Sequence[Tensor]:
        with Refusal(look=False):
            return function(*leaves)

    # Dead code goes first: a recomputed layer's last product, which nobody reads, would be waited for by the passes behind.
    # (Common subexpressions must never be merged: that would undo every recomputation and every second gather.)
    with _use_lazy_graph_module(True):  # its Python is written when it is asked for, and not behind each pass
        graph = make_fx(guarded, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    drop_round_trips(graph)
    graph.graph.eliminate_dead_code()
    return graph


def rewrite(graph: GraphModule) -> None:
    """Applies the passes to a recorded graph."""
    # The order of the passes matters: `overlap` moves nodes; `write_in_place` relies on their final order. Among ranks sums go
    # on while a layer is computed: it must not be one call.
    if has_collectives(graph):
        inline(graph)
    overlap(graph)
    write_in_place(graph)


def _donated(buffers: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, the first of them written into `buffers`; an output that aliases a buffer is copied before that."""
    storages = {storage(buffer) for buffer in buffers}
    places = [*buffers, *[None] * (len(outputs) - len(buffers))]
    outputs = [
        output if output is place or storage(output) not in storages else output.clone()
        for output, place in zip(outputs, places, strict=True)
    ]
    for buffer, output in zip(buffers, outputs, strict=False):
        if (buffer.dtype, buffer.shape) != (output.dtype, output.shape):
            raise TypeError(f"donate: expected a result like its argument, {_kind(buffer)}, found {_kind(output)}")
        if output is not buffer:  # what a step leaves as it is, frozen weights say, is not copied
            buffer.copy_(output)
    return [*buffers, *outputs[len(buffers) :]]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
