"""Label smoothing and z-loss in each form of the head, against torch's and the formula, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from fnrecipe import nn
from fnrecipe.compiler import inductor
from fnrecipe.nn import linear_cross_entropy
from fnrecipe.nn.objective import Objective
from fnrecipe.transforms import jit
from tests.helpers import assert_close, compiles

ROWS, LENGTH, WIDTH, VOCAB = 2, 6, 5, 31
OBJECTIVES = [Objective(0.1, 0.0), Objective(0.0, 0.05), Objective(0.2, 0.03)]


def draws(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x, weight = torch.randn(ROWS, LENGTH, WIDTH, generator=source), torch.randn(VOCAB, WIDTH, generator=source)
    targets = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=source)
    return x.to(dtype), weight, targets, torch.rand(ROWS, LENGTH, generator=source)


def truth(objective: Objective, softcap: float | None, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = x.double() @ weight.double().T
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).flatten(0, 1)
    smoothed = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=objective.label_smoothing)
    square = torch.log(torch.exp(logits).sum(-1)) ** 2
    return ((smoothed + objective.z_loss * square) * weights.double().flatten()).sum()


def found(objective: Objective, softcap: float | None, chunk: int | None, *given: Tensor) -> tuple[Tensor, nn.Terms]:
    x, weight, targets, weights = given
    total, _, terms = nn.cross_entropy(nn.logits(x, weight, chunk, softcap), targets, weights, objective)
    return total, terms


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [None, 5, 12])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_are_those_of_the_formula(objective: Objective, chunk: int | None, softcap: float | None) -> None:
    given = draws()
    ours: Callable[..., Any] = partial(found, objective, softcap, chunk)
    theirs = partial(truth, objective, softcap)
    torch.testing.assert_close(ours(*given)[0].double(), theirs(*given), rtol=1e-5, atol=0)
    assert_close(grad(ours, (0, 1), has_aux=True)(*given)[0], grad(theirs, (0, 1))(*given), 1e-5)


@pytest.mark.parametrize("chunk", [None, 5])
def test_nats_are_those_without_terms_and_terms_are_what_they_add(chunk: int | None) -> None:
    x, weight, targets, weights = draws()
    logits = nn.logits(x, weight, chunk)
    total, nats, terms = nn.cross_entropy(logits, targets, weights, Objective(0.2, 0.03))
    plain, expected, none = nn.cross_entropy(logits, targets, weights)
    assert none == {}
    assert torch.equal(nats, expected)
    assert [*terms] == ["label_smoothing", "z_loss"]
    for name, term in terms.items():
        alone = nn.cross_entropy(logits, targets, weights, Objective(**{name: {"z_loss": 0.03}.get(name, 0.2)}))
        torch.testing.assert_close((term * weights).sum(), alone[0] - plain, rtol=1e-4, atol=1e-6)
        assert torch.equal(alone[2][name], term)
    torch.testing.assert_close(total, ((nats + sum(terms.values())) * weights).sum())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_chunk_in_float16_and_in_a_gpus_form(objective: Objective, in_place: bool) -> None:
    x, weight, targets, weights = draws(torch.float16)
    args = x.flatten(0, 1), targets.flatten(), weights.flatten(), weight.half(), None, True, in_place
    values, *slopes = linear_cross_entropy._of_chunk(*args, objective=objective)
    torch.testing.assert_close(
        (sum(values) * weights.flatten()).sum().double(), truth(objective, None, *draws()), rtol=2e-3, atol=0
    )
    expected = grad(partial(truth, objective, None), (0, 1))(x, weight.half(), targets, weights)
    assert_close([slopes[0].view(x.shape).double(), slopes[1].double()], [each.double() for each in expected], 4e-3)


@pytest.mark.slow
@compiles
def test_compiled_it_gives_the_same() -> None:
    gradient = grad(partial(found, Objective(0.2, 0.03), None, 5), (0, 1), has_aux=True)
    assert_close(jit(gradient, backend=inductor)(*draws())[0], gradient(*draws())[0], 1e-5)
