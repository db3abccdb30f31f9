"""What fnrecipe adds to the bare graph of a step: the fold, `jit`'s look at its arguments, batches made tensors.

The graph runs, or a stand-in for it that does nothing and gives what the graph gave; the CPU time of a folded step with the
stand-in is what is added. One process, one thread, 8 leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks import cases
from benchmarks.peers.fnrecipe import step_and_state
from benchmarks.report import Result
from fnrecipe.build import to_device, to_host
from fnrecipe.data import Batch, Cursor
from fnrecipe.fold import fold
from fnrecipe.runtime import host
from fnrecipe.transforms import jit

LEAVES, EMPTY_STEPS = 8, 300
CPU = torch.device("cpu")


def run(rounds: int) -> list[Result]:
    torch.set_num_threads(1)
    host.keep_freed_memory()
    graph, added = [], []
    stand_in = _StandIn()
    steps = _folded(cases.byte_batches(1)[0], stand_in)
    next(steps)
    for _ in range(rounds):
        stand_in.idle = False
        graph.append(1e3 * _seconds(partial(next, steps)))
        stand_in.idle = True
        added.append(1e3 * _seconds(lambda: [next(steps) for _ in range(EMPTY_STEPS)]) / EMPTY_STEPS)
    share = [100 * mine / all for mine, all in zip(added, graph, strict=True)]
    figures = {"a step": (graph, "CPU ms"), "added to its graph": (added, "CPU ms"), "share": (share, "%")}
    return [Result("overhead", "3M, bytes", "fnrecipe", name, values, unit) for name, (values, unit) in figures.items()]


class _StandIn:
    """Runs a graph, or does nothing and gives what it gave last."""

    def __init__(self) -> None:
        self.idle = False

    def __call__(self, graph: GraphModule) -> Callable[..., Any]:
        given: list[Any] = []

        def call(*inputs: Any) -> Any:
            if not self.idle:
                given[:] = [graph(*inputs)]
            return given[0]

        return call


def _folded(batch: Batch, backend: _StandIn) -> Iterator[Any]:
    function, state = step_and_state(cases.CASES["3M, bytes"].config, num_microbatches=LEAVES)
    step = jit(function, donate=1, backend=backend)

    def stream() -> Iterator[tuple[Batch, Cursor]]:
        while True:
            yield to_device(to_host(batch, CPU), CPU), None

    return fold(step, state, stream())


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
