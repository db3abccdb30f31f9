"""`jit`: a function of trees of tensors as one flat graph of aten operations, traced once for each signature.

The graph is what `make_fx` sees below autograd and `torch.func`: forward, backward and update in one list. Run as it is,
it frees every value after its last use, where eager `torch.func` keeps all of them until the gradient is done (2.3 times
the peak memory on a 4-layer Llama). `torch.compile` must only ever be given that graph: on a Python function with a
custom backward under `torch.func.grad` it has silently dropped the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe.compiler.trace import Backend, interpreter, trace
from fnrecipe.tree import Tree


def jit(
    function: Callable[..., Tree], *, donate: int = 0, fixed: int = 0, backend: Backend = interpreter
) -> Callable[..., Tree]:
    """`function`, traced at the first call with new shapes, dtypes, devices or values that are no tensors; run by `backend`.

    The first `donate` arguments are given up: the first `donate` results, which must have the same structure, are
    written into their buffers. The state then exists once, at addresses that never change. The first `fixed` arguments are
    promised to be such a state, or parts of it, which a CUDA graph can read where they are.
    """
    cache: dict[tuple[object, ...], tuple[Callable[..., Tree], pytree.TreeSpec]] = {}

    def call(*args: Tree) -> Tree:
        inputs, spec = pytree.tree_flatten(args)
        key = (str(spec), *map(signature, inputs))
        if key not in cache:
            graph, outputs = trace(function, args, donate=donate, fixed=fixed)
            cache[key] = backend(graph), outputs
        run, outputs = cache[key]
        return pytree.tree_unflatten(run(*inputs), outputs)

    return call


def signature(leaf: object) -> tuple[object, ...]:
    """What a leaf must have in common with another to be taken by the same graph."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
