"""Inductor as what runs a traced graph: the only place that gives anything to torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule


def inductor(graph: GraphModule) -> Callable[..., Any]:
    """The graph as compiled kernels, made at its first call; torch keeps them on disk, for the next process.

    The graph goes to Inductor as it is: Dynamo, which `torch.compile` begins with, has nothing left to find in it, and does not
    take the operations of FlexAttention.

    Kernels fuse operations and round otherwise than one operation after the other, and what is fused depends on all of the
    graph: results are equal within rounding, not bit for bit, and so are those of other numbers of ranks.

    Raises:
        TypeError: for a Python function: under `torch.func.grad`, torch's compiler has dropped its custom backward.
    """
    if not isinstance(graph, GraphModule):
        raise TypeError(f"inductor: expected a traced graph, found {type(graph).__name__}")
    compiled: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:
        if not compiled:
            compiled.append(_compiled(graph, inputs))
        return compiled[0](*inputs)

    return run


def _compiled(graph: GraphModule, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    from torch._inductor import standalone_compile  # seconds to import, for nothing where nothing is compiled

    return standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
