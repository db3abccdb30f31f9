"""NAdamW: Adam with Nesterov's momentum, and decoupled weight decay."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import counter, running_mean, running_square, zeros
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.tree import Tree


def scale_by_nadam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, momentum_decay: float = 4e-3) -> Transform:
    """NAdam's direction (Dozat 2016), whose momentum `b1 * (1 - 0.96 ** (t * momentum_decay) / 2)` rises with the updates t.

    State: `mean` and `square`, like the parameters; `product`, float64 [], of all momenta so far; `count`, int64 [], of the
    updates made. As in torch.optim.NAdam.
    """

    def momentum_at(count: Tensor) -> Tensor:
        warming: Tensor = torch.pow(0.96, count.to(torch.float64) * momentum_decay)
        return b1 * (1 - 0.5 * warming)

    def init(params: Tree) -> Tree:
        count = counter(params)
        return {**zeros(params, "mean", "square"), "product": torch.ones_like(count, dtype=torch.float64), "count": count}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count = state["count"] + 1
        now, then = momentum_at(count), momentum_at(count + 1)
        product = state["product"] * now
        mean, square = running_mean(state["mean"], gradients, b1), running_square(state["square"], gradients, b2)
        of_mean, of_gradient = then / (1 - product * then), (1 - now) / (1 - product)
        root = 1 / (1 - torch.pow(b2, count.to(torch.float64))).sqrt()

        def leaf(g: Tensor, m: Tensor, s: Tensor) -> Tensor:
            scaled: Tensor = (m * of_mean + g * of_gradient) / (s.sqrt() * root + eps)
            return scaled.to(m.dtype)

        direction = tree.map(leaf, gradients, mean, square)
        return direction, {"mean": mean, "square": square, "product": product, "count": count}, {}

    return Transform(init, update)
