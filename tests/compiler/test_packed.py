"""Packed weights against the products they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe.compiler.packed import packed_weights
from fnrecipe.compiler.trace import Run
from fnrecipe.transforms import jit

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def step(state: Tensor, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.nn.functional.linear(x, weights["in"], weights["bias"])
    return state + 1, torch.nn.functional.linear(hidden, weights["out"])


def weights_of(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"in": (96, 64), "bias": (96,), "out": (80, 96)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_are_those_of_the_weights_that_are_given(dtype: torch.dtype) -> None:
    run = jit(step, donate=1, fixed=2, backend=packed_weights())
    first, second = weights_of(0, dtype), weights_of(1, dtype)
    for rows in (1, 3, 16):
        for weights in (first, first, second, first):
            x, state = torch.randn(rows, 1, 64).to(dtype), torch.zeros(())
            with torch.no_grad():
                state, found = run(state, weights, x)
            expected = step(state, weights, x)[1]
            torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * 100, rtol=TOLERANCE[dtype])


def test_weights_are_packed_once_for_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[int, ...]] = []

    class Counted:
        """oneDNN's operators."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch.ops.mkldnn, name)

        def _reorder_linear_weight(self, weight: Tensor, rows: int) -> Tensor:
            packed.append(tuple(weight.shape))
            return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    monkeypatch.setattr("fnrecipe.compiler.packed.mkldnn", Counted())
    run, weights = jit(step, donate=1, fixed=2, backend=packed_weights()), weights_of(0, torch.float32)
    with torch.no_grad():
        for rows in (1, 2, 5, 5, 2):
            run(torch.zeros(()), weights, torch.randn(rows, 64))
    assert sorted(packed) == [(80, 96), (96, 64)]


def gated(state: Tensor, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = (torch.nn.functional.linear(x, weights[name]) for name in ("left", "right"))
    return state + 1, torch.nn.functional.linear(left * right + left, weights["out"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (3, 1, 64), (2, 3, 64)])
def test_products_of_one_row_are_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    graphs: list[GraphModule] = []
    packed = packed_weights()

    def backend(graph: GraphModule) -> Run:
        graphs.append(graph)
        return packed(graph)

    run, draw = jit(gated, donate=1, fixed=2, backend=backend), torch.Generator().manual_seed(0)
    sizes = {"left": (96, 64), "right": (96, 64), "out": (80, 96)}
    first = {name: torch.randn(*size, generator=draw).to(dtype) for name, size in sizes.items()}
    for weights in (first, {**first, "right": first["left"]}, first):
        x = torch.randn(*shape, generator=draw).to(dtype)
        with torch.no_grad():
            found = run(torch.zeros(()), weights, x)[1]
        expected = gated(torch.zeros(()), weights, x)[1]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * 1000, rtol=TOLERANCE[dtype])
    calls = [node for node in graphs[0].graph.nodes if "_linear_pointwise" in str(node.target)]
    assert len(calls) == (2 if x.numel() == 64 else 3)
