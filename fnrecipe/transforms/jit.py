"""`jit`: a function of trees of tensors as one flat graph of aten operations, traced once for each signature.

The graph is what `make_fx` sees below autograd and `torch.func`: forward, backward and update in one list. Run as it is,
it frees every value after its last use, where eager `torch.func` keeps all of them until the gradient is done (2.3 times
the peak memory on a 4-layer Llama). `torch.compile` must only ever be given that graph: on a Python function with a
custom backward under `torch.func.grad` it has silently dropped the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import tree
from fnrecipe.transforms.alias import home, is_new, readers, storage, written
from fnrecipe.transforms.casts import drop_round_trips
from fnrecipe.transforms.overlap import overlap
from fnrecipe.transforms.products import products

aten = torch.ops.aten


Backend: TypeAlias = Callable[[GraphModule], Callable[..., Any]]
"""What runs a graph: a function of the flat inputs that gives the flat outputs and writes into the same inputs."""


def interpreter(graph: GraphModule) -> Callable[..., Any]:
    """The graph as it is: one operation after the other."""
    return graph


def jit(function: Callable[..., Any], *, donate: int = 0, backend: Backend = interpreter) -> Callable[..., Any]:
    """`function`, traced at the first call with new shapes, dtypes, devices or values that are no tensors; run by `backend`.

    The first `donate` arguments are given up: the first `donate` results, which must have the same structure, are
    written into their buffers. The state then exists once, at addresses that never change.
    """
    cache: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def call(*args: Any) -> Any:
        inputs, spec = pytree.tree_flatten(args)
        signature = (str(spec), *map(_signature, inputs))
        if signature not in cache:
            graph, outputs = trace(function, args, donate=donate)
            cache[signature] = backend(graph), outputs
        run, outputs = cache[signature]
        return pytree.tree_unflatten(run(*inputs), outputs)

    return call


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def trace(function: Callable[..., Any], args: tuple[Any, ...], *, donate: int = 0) -> tuple[GraphModule, pytree.TreeSpec]:
    """The graph that `jit` runs for `args`, from their leaves to the results' leaves, and the structure of the results.

    The args may be fake tensors; each node's result is one in its `meta["val"]`. The graph's `meta["donated"]` is how many
    of its first inputs are donated.
    """
    inputs, spec = pytree.tree_flatten(args)
    given = len(tree.leaves(args[:donate]))
    results: list[pytree.TreeSpec] = []

    def flat(*leaves: Any) -> list[Any]:
        outputs, result = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), spec)))
        results.append(result)
        return _donated(leaves[:given], outputs)

    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    drop_round_trips(graph)
    graph.graph.eliminate_dead_code()
    overlap(graph)
    _write_in_place(graph)
    products(graph)
    graph.meta["donated"] = given
    return graph, results[0]


def _donated(buffers: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, the first of them written into the buffers; what still looks into a buffer is copied out before."""
    storages = {storage(buffer) for buffer in buffers}
    outputs = [output.clone() if storage(output) in storages else output for output in outputs]
    for buffer, output in zip(buffers, outputs, strict=False):
        if (buffer.dtype, buffer.shape) != (output.dtype, output.shape):
            raise TypeError(f"donate: expected a result like its argument, {_kind(buffer)}, found {_kind(output)}")
        buffer.copy_(output)
    return [*buffers, *outputs[len(buffers) :]]


def _write_in_place(module: GraphModule) -> None:
    """Drops copies that are only there to be written into.

    `copy = clone(buffer); write(copy); buffer.copy_(copy)` becomes `write(buffer)`, and `copy = clone(value); write(copy)`
    becomes `write(value)`, if nothing reads the old value once `write` has begun.
    """
    order = {node: number for number, node in enumerate(module.graph.nodes)}

    def written_last(copy: Node, *others: Node) -> bool:
        (source,) = copy.all_input_nodes
        writes = [order[user] for user in copy.users if user not in others and user.op == "call_function"]
        reads = [order[user] for user in readers(*home(source)) if user not in (copy, *others)]
        same = copy.meta["val"].stride() == source.meta["val"].stride()
        return same and bool(writes) and max(reads, default=-1) < min(writes)

    for end in list(module.graph.find_nodes(op="call_function", target=aten.copy_.default)):
        buffer, copy = (written(arg) for arg in end.args)
        cloned = copy.target == aten.clone.default and copy.args[0] is buffer
        if buffer.op == "placeholder" and cloned and written_last(copy, end):
            for node in (end, copy):
                node.replace_all_uses_with(buffer)
                module.graph.erase_node(node)
    for copy in list(module.graph.find_nodes(op="call_function", target=aten.clone.default)):
        (source,) = copy.all_input_nodes
        if is_new(*home(source)) and written_last(copy):
            copy.replace_all_uses_with(source)
            module.graph.erase_node(copy)
    module.recompile()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
