"""`jit`: a function of trees of tensors as one flat graph of aten operations, traced once for each signature.

The graph is what `make_fx` sees below autograd and `torch.func`: forward, backward and update in one list. Run as it is,
it frees every value after its last use, where eager `torch.func` keeps all of them until the gradient is done (2.3 times
the peak memory on a 4-layer Llama). `torch.compile` must only ever be given that graph: on a Python function with a
custom backward under `torch.func.grad` it has silently dropped the backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from weakref import ref

import attrs
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe.compiler.trace import Backend, Run, interpreter, trace
from fnrecipe.tree import Tree


def jit(
    function: Callable[..., Tree], *, donate: int = 0, fixed: int = 0, backend: Backend = interpreter
) -> Callable[..., Tree]:
    """`function`, traced at the first call with new shapes, dtypes, devices or values that are no tensors; run by `backend`.

    The first `donate` arguments are given up: the first `donate` results, which must have the same structure, are
    written into their buffers. The state then exists once, at addresses that never change. The first `fixed` arguments are
    promised to be such a state, or parts of it, which a CUDA graph can read where they are.
    """
    cache: dict[tuple[object, ...], tuple[Run, pytree.TreeSpec]] = {}
    kinds: dict[tuple[object, ...], int] = {}
    latest: list[_Known] = []

    def call(*args: Tree) -> Tree:
        known = latest[0].recalled(args[:donate]) if latest else None
        if known is None:
            leaves, key = _flattened(args[:donate])
            known = leaves, kinds.setdefault(key, len(kinds))
        (donated, kind), (rest, key) = known, _flattened(args[donate:])
        if (kind, *key) not in cache:
            graph, outputs = trace(function, args, donate=donate, fixed=fixed)
            cache[kind, *key] = backend(graph), outputs
        run, outputs = cache[kind, *key]
        results = run(*donated, *rest)
        if not donated or outputs.type is not tuple or not all(map(operator.is_, results, donated)):
            return pytree.tree_unflatten(results, outputs)
        # Other trees with the same leaves: who keeps an old one is seen to keep it.
        renewed = [given if isinstance(given, Tensor) else copy(given) for given in args[:donate]]
        latest[:] = _Known.of(renewed, donated, kind)
        return *renewed, *_unflattened(results[len(donated) :], outputs.children()[donate:])

    return call


@attrs.frozen
class _Known:
    """Trees that were donated in a call, and came back as its results: their leaves, and the number of their signature.

    To flatten a state of a thousand tensors and compare their shapes takes milliseconds, in which a GPU could wait. Nothing is
    kept alive for that.
    """

    trees: Sequence[ref[Tree]]
    leaves: Sequence[ref[Tensor]]
    kind: int

    @staticmethod
    def of(trees: Sequence[Tree], leaves: Sequence[Tensor], kind: int) -> list[_Known]:
        """One, or none where a tree is of a class without weak references, such as a dict."""
        try:
            return [_Known([*map(ref, trees)], [*map(ref, leaves)], kind)]
        except TypeError:
            return []

    def recalled(self, trees: Sequence[Tree]) -> tuple[list[Tensor], int] | None:
        """Leaves and number, if these are the trees."""
        if not all(tree is there() for tree, there in zip(trees, self.trees, strict=True)):
            return None
        leaves = [leaf() for leaf in self.leaves]
        found = [leaf for leaf in leaves if leaf is not None]
        return (found, self.kind) if len(found) == len(leaves) else None


def _flattened(trees: Sequence[Tree]) -> tuple[list[Tensor], tuple[object, ...]]:
    """The leaves, and what a graph for them depends on."""
    leaves, spec = pytree.tree_flatten(trees)
    return leaves, (str(spec), *map(signature, leaves))


def _unflattened(leaves: Sequence[Tensor], specs: Iterable[pytree.TreeSpec]) -> Iterator[Tree]:
    given = iter(leaves)
    return (pytree.tree_unflatten([*islice(given, spec.num_leaves)], spec) for spec in specs)


def signature(leaf: object) -> tuple[object, ...]:
    """What a leaf must have in common with another to be taken by the same graph."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
