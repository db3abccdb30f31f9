"""`jit`: a function of trees of tensors as one flat graph of aten operations, traced once for each signature.

The graph is what `make_fx` sees below autograd and `torch.func`: forward, backward and update in one list. Run as it is,
it frees every value after its last use, where eager `torch.func` keeps all of them until the gradient is done (2.3 times
the peak memory on a 4-layer Llama). `torch.compile` must only ever be given that graph: on a Python function with a
custom backward under `torch.func.grad` it has silently dropped the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from fnrecipe import tree
from fnrecipe.transforms.alias import readers, written
from fnrecipe.transforms.overlap import overlap

aten = torch.ops.aten


@attrs.frozen
class _Traced:
    run: Callable[..., list[Tensor]]
    spec: pytree.TreeSpec


def jit(function: Callable[..., Any], *, donate: int = 0) -> Callable[..., Any]:
    """`function`, traced at the first call with new shapes, dtypes, devices or values that are no tensors.

    The first `donate` arguments are given up: the first `donate` results, which must have the same structure, are
    written into their buffers. The state then exists once, at addresses that never change.
    """
    cache: dict[Any, _Traced] = {}

    def call(*args: Any) -> Any:
        inputs, spec = pytree.tree_flatten(args)
        signature = (str(spec), *map(_signature, inputs))
        if signature not in cache:
            cache[signature] = _trace(function, args, donate)
        traced = cache[signature]
        return pytree.tree_unflatten(traced.run(*inputs), traced.spec)

    return call


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _trace(function: Callable[..., Any], args: tuple[Any, ...], donate: int) -> _Traced:
    graph, spec = trace(function, args, donate=donate)
    return _Traced(graph, spec)


def trace(function: Callable[..., Any], args: tuple[Any, ...], *, donate: int = 0) -> tuple[GraphModule, pytree.TreeSpec]:
    """The graph that `jit` runs for `args`, from their leaves to the results' leaves, and the structure of the results.

    The args may be fake tensors; each node's result is one in its `meta["val"]`.
    """
    inputs, spec = pytree.tree_flatten(args)
    given = len(tree.leaves(args[:donate]))
    results: list[pytree.TreeSpec] = []

    def flat(*leaves: Any) -> list[Any]:
        outputs, result = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), spec)))
        results.append(result)
        return _donated(leaves[:given], outputs)

    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    graph.graph.eliminate_dead_code()
    overlap(graph)
    _write_in_place(graph)
    return graph, results[0]


def _donated(buffers: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, the first of them written into the buffers; what still looks into a buffer is copied out before."""
    storages = {_storage(buffer) for buffer in buffers}
    outputs = [output.clone() if _storage(output) in storages else output for output in outputs]
    for buffer, output in zip(buffers, outputs, strict=False):
        if (buffer.dtype, buffer.shape) != (output.dtype, output.shape):
            raise TypeError(f"donate: expected a result like its argument, {_kind(buffer)}, found {_kind(output)}")
        buffer.copy_(output)
    return [*buffers, *outputs[len(buffers) :]]


def _write_in_place(module: GraphModule) -> None:
    """Drops the copies around an operation that writes into a copy of a buffer which is then the buffer's new value.

    That is: `copy = clone(buffer); write(copy); buffer.copy_(copy)` becomes `write(buffer)`, if nothing reads the old value
    of the buffer once `write` has begun.
    """
    order = {node: number for number, node in enumerate(module.graph.nodes)}
    for end in list(module.graph.find_nodes(op="call_function", target=aten.copy_.default)):
        buffer, copy = (written(arg) for arg in end.args)
        if buffer.op != "placeholder" or copy.target != aten.clone.default or copy.args[0] is not buffer:
            continue
        if copy.meta["val"].stride() != buffer.meta["val"].stride():
            continue
        writes = [order[user] for user in copy.users if user is not end and user.op == "call_function"]
        reads = [order[user] for user in readers(buffer) if user not in (end, copy)]
        if writes and max(reads, default=-1) < min(writes):
            for node in (end, copy):
                node.replace_all_uses_with(buffer)
                module.graph.erase_node(node)
    module.recompile()


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
