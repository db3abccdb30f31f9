"""Inductor as what runs a traced graph: the only place that gives anything to torch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fnrecipe.compiler.matmul import COPIED_BY_A_KERNEL, use_onednn_matmul
from fnrecipe.compiler.scalars import materialize_scalars
from fnrecipe.compiler.send_buffers import keep_send_buffers_alive


def inductor(graph: GraphModule) -> Callable[..., Any]:
    """The graph as compiled kernels, made at its first call; torch keeps them on disk, for the next process.

    The graph itself is changed for it, into one that gives the same within rounding.

    Kernels fuse operations and round otherwise than one operation after the other, and what is fused depends on all of the
    graph: results are equal within rounding, not bit for bit, and so are those of other numbers of ranks.

    Raises:
        TypeError: for a Python function: under `torch.func.grad`, `torch.compile` has dropped its custom backward.
    """
    if not isinstance(graph, GraphModule):
        raise TypeError(f"inductor: expected a traced graph, found {type(graph).__name__}")
    compiled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        with torch.no_grad():
            if not compiled:
                compiled.append(_compiled(graph, args))
            return compiled[0](*args)

    return call


def _compiled(graph: GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
    from torch import _inductor  # a second to import, for nothing where nothing is compiled

    for part in graph.modules():
        if isinstance(part, GraphModule):
            use_onednn_matmul(part, COPIED_BY_A_KERNEL)
            materialize_scalars(part)
            keep_send_buffers_alive(part)
    shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # without these torch would not look into its cache
    with tracing(TracingContext(shapes)):
        run: Callable[..., Any] = _inductor.compile(graph, list(args))
    return run
