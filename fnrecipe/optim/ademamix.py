"""AdEMAMix: Adam with a second, much slower mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import counter, running_mean, running_square, zeros
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.tree import Tree


def scale_by_ademamix(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 2.0,
    eps: float = 1e-8,
    *,
    num_alpha_steps: int = 0,
    num_b3_steps: int = 0,
) -> Transform:
    """AdEMAMix's direction (Pagliardini et al. 2024, arXiv:2409.03137): to Adam's mean comes `alpha` times one at `b3`.

    The slow mean begins at 0 and its bias is not corrected. In so many updates `alpha` rises in a line from 0, and the
    half-life of the slow mean from that of `b1`.

    State: `mean`, `slow` and `square`, like the parameters, and `count`, int64 [], of the updates made.
    """

    def slow_decay(count: Tensor) -> Tensor:
        share = torch.clamp(count / max(num_b3_steps, 1), max=1.0) if num_b3_steps else torch.ones_like(count)
        half_life = (1 - share) * _half_life(b1) + share * _half_life(b3)
        return torch.where(count < num_b3_steps, torch.pow(0.5, 1 / (half_life + 1)), b3)

    def init(params: Tree) -> Tree:
        return {**zeros(params, "mean", "slow", "square"), "count": counter(params)}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count = state["count"] + 1
        number = count.to(torch.float64)
        mean, square = running_mean(state["mean"], gradients, b1), running_square(state["square"], gradients, b2)
        weight = 1 - slow_decay(number)
        slow = tree.map(lambda m, g: torch.lerp(m, g, weight.to(m.dtype)), state["slow"], gradients)
        share = alpha * (torch.clamp(number / num_alpha_steps, max=1.0) if num_alpha_steps else torch.ones_like(number))
        scale, root = 1 / (1 - torch.pow(b1, number)), 1 / (1 - torch.pow(b2, number)).sqrt()

        def leaf(m: Tensor, n: Tensor, s: Tensor) -> Tensor:
            return ((m * scale + n * share) / (s.sqrt() * root + eps)).to(m.dtype)

        direction = tree.map(leaf, mean, slow, square)
        return direction, {"mean": mean, "slow": slow, "square": square, "count": count}, {}

    return Transform(init, update)


def _half_life(decay: float) -> float:
    """Steps after which a gradient has half of its weight, less one."""
    return math.log(0.5) / math.log(decay + 1e-8) - 1
