"""What runs the graphs of a run, and what its user is told while they are traced and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from torch import Tensor
from torch.fx import GraphModule

from fnrecipe.compiler import Backend
from fnrecipe.compiler.trace import Run
from fnrecipe.shell.screen.display import duration

Tell: TypeAlias = Callable[[str], None]
Waiting: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Shows a text for as long as the context lasts."""


def with_progress(backend: Backend, tell: Tell, waiting: Waiting) -> Backend:
    """`backend`, telling what it was given, and how long it compiled that if it does."""

    def telling(graph: GraphModule) -> Run:
        graphs = [module for module in graph.modules() if isinstance(module, GraphModule)]  # regions count once
        size = f"{sum(node.op == 'call_function' for part in graphs for node in part.graph.nodes):,} operations"
        tell(f"traced {size}")
        run = backend(graph)
        return run if run is graph else _compiled(run, size, tell, waiting)

    return telling


def _compiled(run: Run, size: str, tell: Tell, waiting: Waiting) -> Run:
    """What runs a graph, which it compiles at its first call."""
    calls = iter([True])

    def call(*args: Tensor) -> Sequence[Tensor]:
        if not next(calls, False):
            return run(*args)
        started, known = time.monotonic(), _from_cache()
        with waiting(f"compiling {size}"):
            results = run(*args)
        where = ", from the cache" if _from_cache() > known else ""
        tell(f"compiled {size} in {duration(time.monotonic() - started)}{where}")
        return results

    return call


def _from_cache() -> int:
    """Graphs whose kernels were found on disk so far."""
    from torch._dynamo.utils import counters  # a second to import, for nothing where nothing is compiled

    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
