"""CUDA graphs: what a traced graph gives the device to do, recorded once and launched as a whole from then on.

Thousands of launches from Python become one. The state must lie at addresses that do not change, which donation sees to.

The logic is tested with a recorder on the CPU; `on_device` has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe.compiler.trace import Backend

Capture: TypeAlias = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]]
"""Records what a function would do, without doing it: gives what does it, and the results, which are filled when that runs."""


def on_device(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """The `Capture` of the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # for another thread may be pinning memory
        results = function()
    return graph.replay, results


def cuda_graph(backend: Backend, capture: Capture = on_device) -> Backend:
    """`backend`, whose run of a graph is captured at the second call and replayed there and at all later ones.

    The first call runs as ever: what it compiles, tunes and loads could not be captured. Donated inputs are used where they
    are; the others are copied into inputs that stay. Results are copied out, for the next replay writes over them.

    Raises:
        ValueError: at a call, if a donated input is not where it was when the graph was captured.
    """

    def captured(graph: GraphModule) -> Callable[..., Any]:
        run, donated = backend(graph), graph.meta["donated"]
        replays: list[Callable[..., Any]] = []
        first = iter([run])

        def call(*inputs: Any) -> Any:
            if (once := next(first, None)) is not None:
                return once(*inputs)
            if not replays:
                replays.append(_recorded(run, inputs, donated, capture))
            return replays[0](*inputs)

        return call

    return captured


def _recorded(run: Callable[..., Any], inputs: Sequence[Any], donated: int, capture: Capture) -> Callable[..., Any]:
    state, addresses = inputs[:donated], _addresses(inputs[:donated])
    static = [given.clone() if isinstance(given, Tensor) else given for given in inputs[donated:]]
    replay, results = capture(lambda: run(*state, *static))

    def call(*inputs: Any) -> Any:
        if _addresses(inputs[:donated]) != addresses:
            raise ValueError("cuda_graph: expected the donated inputs where they were captured, found them at other addresses")
        for place, given in zip(static, inputs[donated:], strict=True):
            if isinstance(place, Tensor):
                place.copy_(given, non_blocking=True)
        replay()
        return [*inputs[:donated], *(result.clone() for result in results[donated:])]

    return call


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
