"""`jit`: a function of trees of tensors as one flat graph of aten operations, traced once for each signature.

The graph is what `make_fx` sees below autograd and `torch.func`: forward, backward and update in one list. Run as it is,
it frees every value after its last use, where eager `torch.func` keeps all of them until the gradient is done (2.3 times
the peak memory on a 4-layer Llama). `torch.compile` must only ever be given that graph: on a Python function with a
custom backward under `torch.func.grad` it has silently dropped the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import tree


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
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _trace(function: Callable[..., Any], args: tuple[Any, ...], donate: int) -> _Traced:
    inputs, spec = pytree.tree_flatten(args)
    given = tree.leaves(args[:donate])
    results: list[pytree.TreeSpec] = []

    def flat(*leaves: Any) -> list[Any]:
        outputs, result = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), spec)))
        results.append(result)
        for buffer, output in zip(leaves[: len(given)], outputs, strict=False):
            buffer.copy_(output)
        return [*leaves[: len(given)], *outputs[len(given) :]]

    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    return _Traced(graph, results[0])
