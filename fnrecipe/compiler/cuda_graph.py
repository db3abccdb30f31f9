"""CUDA graphs: the kernels that a traced graph launches, captured once and launched as a whole from then on.

Thousands of launches from Python become one. The state must lie at addresses that do not change, which donation sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule

from fnrecipe.compiler.regions import all_nodes
from fnrecipe.compiler.trace import Backend, Run
from fnrecipe.errors import UsageError

Capture: TypeAlias = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]]
"""Captures the kernels of a function without running them: returns what replays them, and the results that a replay fills."""


def on_device(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """The `Capture` of the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be pinning memory
        results = function()
    return graph.replay, results


def cuda_graph(backend: Backend, capture: Capture = on_device, *, required: bool = False) -> Backend:
    """`backend`, whose run of a graph is captured at the second call, and replayed then and at every later call.

    The first call runs uncaptured: compiling, tuning and loading could not be captured. Donated and fixed inputs are used in
    place; the others are copied into static inputs. Results are copied out, because the next replay overwrites them.

    A graph with an operator that is tagged `cudagraph_unsafe`, because it reads a number on the host, is not captured.

    Raises:
        UsageError: for such a graph, if capturing is `required`.
        ValueError: at a call, if a fixed input is not where it was when the graph was captured.
    """

    def captured(graph: GraphModule) -> Run:
        if (unsafe := _unsafe(graph)) and required:
            raise UsageError(f"trainer.cuda_graph: expected auto or false for a step with {unsafe[0]}, found true")
        run, donated, fixed = backend(graph), graph.meta["donated"], graph.meta["fixed"]
        if unsafe:
            return run
        replays: list[Run] = []
        first = iter([run])

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            if (once := next(first, None)) is not None:
                return once(*inputs)
            if not replays:
                replays.append(_recorded(run, inputs, donated, fixed, capture))
            return replays[0](*inputs)

        return call

    return captured


def _unsafe(graph: GraphModule) -> list[str]:
    """The names of the operators that cannot be captured."""
    operators = [node.target for node in all_nodes(graph) if isinstance(node.target, OpOverload)]
    return [str(operator) for operator in operators if torch.Tag.cudagraph_unsafe in operator.tags]


def _recorded(run: Run, inputs: Sequence[Tensor], donated: int, fixed: int, capture: Capture) -> Run:
    state, addresses = inputs[:fixed], _addresses(inputs[:fixed])
    static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs[fixed:]]
    replay, results = capture(lambda: run(*state, *static))

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        if _addresses(inputs[:fixed]) != addresses:
            raise ValueError("cuda_graph: expected the fixed inputs where they were captured, found them at other addresses")
        for buffer, leaf in zip(static, inputs[fixed:], strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(leaf, non_blocking=True)
        replay()
        return [*inputs[:donated], *(result.clone() for result in results[donated:])]

    return call


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
