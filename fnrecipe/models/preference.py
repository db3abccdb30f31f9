"""Losses of preferences: pure functions of log-probabilities of answers, a number for each pair or answer.

`chosen` and `rejected` are [N]: log-probabilities of the better and of the worse answer to the same prompt, of which each loss
says whether they are sums over tokens or means, and whether a reference model's are subtracted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(β (chosen - rejected)) of sums less those of the reference model (Rafailov et al. 2023, arXiv:2305.18290).

    `label_smoothing` is the probability that a pair is the wrong way round (Mitchell 2023, "cDPO").
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO of sums as they are, without a reference model (Xu et al. 2024, arXiv:2401.08417)."""
    return dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log-odds of chosen - log-odds of rejected) of means (Hong et al. 2024, arXiv:2403.07691).

    The odds of a probability p are p / (1 - p). Of sums, p would be 0 in float32, and its odds p itself.
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -F.logsigmoid(odds)


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(β (chosen - rejected) - gamma) of means (Meng et al. 2024, arXiv:2405.14734)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(ratios: Tensor, desirable: Tensor, divergence: Tensor, *, beta: float, weights: tuple[float, float]) -> Tensor:
    """λ (1 - sigmoid(β (r - z))) of desirable answers, and with z - r of the others (Ethayarajh et al. 2024, arXiv:2402.01306).

    ratios      r: sums of log-probabilities less those of the reference model
    desirable   bool, which answers are
    divergence  z [], an estimate of the model's divergence from the reference, which is not differentiated
    weights     λ of desirable answers, and of the others
    """
    sign = torch.where(desirable, 1.0, -1.0)
    losses = torch.sigmoid(-sign * beta * (ratios - divergence.detach()))
    return torch.where(desirable, weights[0] * losses, weights[1] * losses)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler 2012): two formulas, on either side of -log 2.

    Each is given numbers of its own side alone, or the gradient of the one that is not meant would be NaN.
    """
    near = x > -0.6931471805599453
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
