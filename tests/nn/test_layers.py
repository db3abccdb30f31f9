"""Functions of models against their formulas, with first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev, vmap

from fnrecipe import nn
from fnrecipe.transforms import jit

Function = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Function, Function, tuple[int, ...]]] = {
    "rms_norm": (lambda x, w: nn.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (4,), w, 1e-5), (4,)),
    "swiglu": (nn.swiglu, lambda x, v: F.silu(x) * v, (2, 3, 4)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Function, Function, tuple[Tensor, Tensor]]:
    ours, formula, shape = CASES[request.param]
    source = torch.Generator().manual_seed(0)
    draw = [torch.randn(*size, generator=source, dtype=torch.float64) for size in ((2, 3, 4), shape)]
    return ours, formula, (draw[0], draw[1])


def test_values_and_both_derivatives_are_those_of_the_formula(case: tuple[Function, Function, tuple[Tensor, Tensor]]) -> None:
    ours, formula, args = case
    torch.testing.assert_close(ours(*args), formula(*args))
    for derivative in (jacrev, lambda f, argnums: jacrev(jacrev(f, argnums), argnums)):
        found, expected = (derivative(lambda *args: f(*args).sin().sum(), (0, 1))(*args) for f in (ours, formula))  # noqa: B023
        torch.testing.assert_close(found, expected)


def test_the_traced_gradient_and_that_of_several_seeds_are_the_same(
    case: tuple[Function, Function, tuple[Tensor, Tensor]],
) -> None:
    ours, formula, args = case
    slope, expected = (grad(lambda *args: f(*args).sin().sum(), (0, 1)) for f in (ours, formula))  # noqa: B023
    torch.testing.assert_close(jit(slope)(*args), expected(*args))
    several = [torch.stack([arg, 2 * arg]) for arg in args]
    torch.testing.assert_close(vmap(slope)(*several), vmap(expected)(*several))


def test_a_norm_in_half_precision_is_rounded_once() -> None:
    source = torch.Generator().manual_seed(0)
    x, weight, slopes = (torch.randn(*size, generator=source) for size in ((8, 64), (64,), (8, 64)))
    half = x.bfloat16()

    def summed(x: Tensor, weight: Tensor) -> Tensor:
        return (nn.rms_norm(x, weight, 1e-5).float() * slopes.bfloat16().float()).sum()

    assert torch.equal(nn.rms_norm(half, weight, 1e-5), nn.rms_norm(half.float(), weight, 1e-5).bfloat16())
    found, expected = grad(summed, (0, 1))(half, weight), grad(summed, (0, 1))(half.float(), weight)
    assert [f.dtype for f in found] == [torch.bfloat16, torch.float32]
    assert torch.equal(found[0], expected[0].bfloat16())
    torch.testing.assert_close(found[1], expected[1])
