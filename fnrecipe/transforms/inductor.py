"""Inductor as what runs a traced graph: the only place that gives anything to `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule


def inductor(graph: GraphModule) -> Callable[..., Any]:
    """The graph as compiled kernels, made at its first call; torch keeps them on disk, for the next process.

    Kernels fuse operations and round otherwise than one operation after the other, and what is fused depends on all of the
    graph: results are equal within rounding, not bit for bit, and so are those of other numbers of ranks.

    Raises:
        TypeError: for a Python function: under `torch.func.grad`, `torch.compile` has dropped its custom backward.
    """
    if not isinstance(graph, GraphModule):
        raise TypeError(f"inductor: expected a traced graph, found {type(graph).__name__}")
    compiled: Callable[..., Any] = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled
