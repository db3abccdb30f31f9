"""Losses of preferences against their formulas in float64 by NumPy, and their gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fnrecipe.models import preference

Array = NDArray[np.float64]

CHOSEN = np.array([-1.5, -0.2, -40.0, -3.0, -0.01, -250.0])
REJECTED = np.array([-2.5, -0.9, -3.0, -3.0, -6.0, -251.0])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0, -x)


def log_odds(x: Array) -> Array:
    """log(p / (1 - p)) of the logarithm of p."""
    return x - np.log(1 - np.exp(x))


def smoothed_dpo(chosen: Array, rejected: Array) -> Array:
    margin = 0.3 * (chosen - rejected)
    return -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin)


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Array, Array], Array]]] = {
    "dpo": (partial(preference.dpo, beta=0.1), lambda c, r: -log_sigmoid(0.1 * (c - r))),
    "cdpo": (partial(preference.dpo, beta=0.3, label_smoothing=0.1), smoothed_dpo),
    "cpo": (partial(preference.cpo, beta=1.5), lambda c, r: -log_sigmoid(1.5 * (c - r))),
    "orpo": (preference.orpo, lambda c, r: -log_sigmoid(log_odds(c) - log_odds(r))),
    "simpo": (partial(preference.simpo, beta=2.0, gamma=0.7), lambda c, r: -log_sigmoid(2 * (c - r) - 0.7)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_are_their_formulas(name: str) -> None:
    loss, formula = PAIRS[name]
    found = loss(torch.tensor(CHOSEN), torch.tensor(REJECTED))
    np.testing.assert_allclose(found.numpy(), formula(CHOSEN, REJECTED), rtol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_differences(name: str) -> None:
    loss, _ = PAIRS[name]
    given = [torch.tensor(values[[0, 1, 3, 4]], requires_grad=True) for values in (CHOSEN, REJECTED)]
    assert torch.autograd.gradcheck(loss, given)


def test_a_loss_falls_as_the_margin_grows_and_is_log_2_without_one() -> None:
    margins = torch.linspace(-3, 3, 13)
    for name in ("dpo", "cpo", "orpo"):
        values = PAIRS[name][0](margins - 5, torch.full_like(margins, -5.0))
        assert bool((values.diff() < 0).all()), name
        assert values[6].item() == pytest.approx(np.log(2), rel=1e-6)


def test_odds_are_right_in_float32_from_the_least_to_the_likeliest_answer() -> None:
    values = torch.tensor([-1e-6, -1e-3, -0.69, -0.70, -5.0, -80.0, -1000.0], requires_grad=True)
    found = preference.orpo(values, torch.full_like(values, -1.0))
    wide = values.detach().double().numpy()
    odds = wide - np.log(-np.expm1(wide)) - log_odds(np.array(-1.0))
    np.testing.assert_allclose(found.detach().numpy(), np.logaddexp(0, -odds), rtol=2e-6)
    found.sum().backward()
    assert values.grad is not None
    assert bool(torch.isfinite(values.grad).all())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
def test_kto_is_its_formula_and_does_not_differentiate_the_divergence(weights: tuple[float, float]) -> None:
    ratios = torch.tensor([0.5, -2.0, 3.0, 0.0, 40.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, False, True, True])
    divergence = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    loss = partial(preference.kto, desirable=desirable, beta=0.25, weights=weights)
    found = loss(ratios, divergence=divergence)
    r = ratios.detach().numpy()
    better, worse = weights[0] * (1 - sigmoid(0.25 * (r - 0.8))), weights[1] * (1 - sigmoid(0.25 * (0.8 - r)))
    np.testing.assert_allclose(found.detach().numpy(), np.where(desirable.numpy(), better, worse), rtol=1e-12)
    assert torch.autograd.gradcheck(partial(loss, divergence=divergence.detach()), [ratios])
    assert torch.autograd.grad(found.sum(), divergence, allow_unused=True) == (None,)
