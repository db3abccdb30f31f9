"""Rematerialisation: the same values and gradients, and intermediate values that are computed twice instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe.compiler import trace
from fnrecipe.transforms import remat
from tests.helpers import assert_close, assert_same_bits, draw

PARAMS = draw({"in": torch.zeros(6, 5), "out": torch.zeros(5, 6)}, seed=0)
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def block(params: Any, x: Tensor, shift: Tensor, number: Tensor) -> Tensor:
    return torch.tanh(x @ params["in"].T + shift + number) @ params["out"].T + x


def deep(wrap: Callable[..., Any], layers: int = 3) -> Callable[..., Tensor]:
    def function(params: Any, x: Tensor) -> Tensor:
        for number in range(layers):
            x = wrap(block)(params, x, torch.ones(6), torch.tensor(number))
        return x.sin().sum()

    return function


def plain(function: Any) -> Any:
    return function


def matrix_products(function: Callable[..., Any], *args: Any) -> int:
    graph, _ = trace(function, args)
    return sum(node.target == torch.ops.aten.mm.default for node in graph.graph.nodes)


def test_values_and_gradients_have_the_same_bits() -> None:
    for argnums in (0, 1, (0, 1)):
        expected = grad(deep(plain), argnums=argnums)(PARAMS, X)
        assert_same_bits(grad(deep(remat), argnums=argnums)(PARAMS, X), expected)
        traced = make_fx(grad(deep(remat), argnums=argnums), tracing_mode="fake", _allow_non_fake_inputs=True)(PARAMS, X)
        assert_same_bits(traced(PARAMS, X), expected)
    assert_same_bits(deep(remat)(PARAMS, X), deep(plain)(PARAMS, X))


def test_the_traced_gradient_computes_each_block_again() -> None:
    def sums(wrap: Callable[..., Any]) -> int:
        return matrix_products(grad(deep(wrap)), PARAMS, X)

    assert sums(plain) == 3 * 2 + 3 * 4 - 1  # forward, backward; nobody wants the gradient of the first x
    assert sums(remat) == sums(plain) + 3  # what a block gives is known already: only its inner product is computed again


def test_it_composes_with_itself_and_with_vmap() -> None:
    expected = grad(deep(plain))(PARAMS, X)
    assert_same_bits(grad(remat(deep(remat)))(PARAMS, X), expected)
    assert_close(vmap(grad(deep(remat)), in_dims=(None, 0))(PARAMS, X[:, None])["in"].sum(0), expected["in"], 1e-6)


def test_a_gradient_of_a_gradient_is_that_of_finite_differences() -> None:
    params = {name: leaf.double() for name, leaf in PARAMS.items()}

    def slope(x: Tensor) -> Tensor:
        return grad(lambda x: deep(remat)(params, x))(x).square().sum()

    x, distance = X.double(), torch.zeros(3, 5, dtype=torch.float64).index_fill(0, torch.tensor(1), 1e-6)
    difference = (slope(x + distance) - slope(x - distance)) / 2e-6
    torch.testing.assert_close(grad(slope)(x)[1].sum(), difference, rtol=1e-6, atol=1e-8)
