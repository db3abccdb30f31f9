"""Schedule-free AdamW: an average of all steps takes the place of a schedule that ends."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.clip import clip_by_global_norm
from fnrecipe.optim.descent import add_decayed_weights
from fnrecipe.optim.moments import counter, running_square, zeros
from fnrecipe.optim.partition import Mask, matrices
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.stochastic_rounding import wide
from fnrecipe.optim.transform import Report, Transform, chain
from fnrecipe.tree import Tree


def schedule_free_adamw(
    schedule: Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Scheduled = 0.0,
    mask: Mask = matrices,
    power: float = 0.0,
    rate_power: float = 2.0,
    max_norm: float | None = None,
) -> Transform:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), of a schedule without an end: constant, behind warm-up.

    Three points: z makes AdamW's steps without a mean of gradients; x is the mean of all z, that of update t weighted by
    t ** power times the largest rate so far to the `rate_power`; the parameters are y = b1 x + (1 - b1) z, where the loss and
    its gradient are taken, with b1 above 0. A model is evaluated at x, which is `shown`.

    State: `z` and `square`, like the parameters; float64 []: `rate`, the largest so far, and `weight`, the sum of all weights;
    `count`, int64 [], of the updates made. It is the last of the chain.
    """
    (b1, b2), decay = betas, add_decayed_weights(weight_decay, mask)

    def init(params: Tree) -> Tree:
        count = counter(params)
        numbers = {name: torch.zeros_like(count, dtype=torch.float64) for name in ("rate", "weight")}
        return {"z": tree.map(torch.clone, params), **zeros(params, "square"), **numbers, "count": count}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count, rate = state["count"] + 1, schedule(step)
        number = count.to(torch.float64)
        largest = torch.maximum(state["rate"], rate.to(torch.float64))
        weight = torch.pow(number, power) * torch.pow(largest, rate_power)
        total = state["weight"] + weight
        share = torch.where(total > 0, weight / total, 0.0)
        square, root = running_square(state["square"], gradients, b2), 1 / (1 - torch.pow(b2, number)).sqrt()
        directions = tree.map(lambda g, s: (g / (s.sqrt() * root + eps)).to(g.dtype), gradients, square)
        directions, _, report = decay.update(directions, (), params, step)

        def moved(p: Tensor, z: Tensor, u: Tensor) -> Tensor:
            return ((z - p) * share + u * (rate * (b1 * (1 - share) - 1))).to(p.dtype)

        updates = tree.map(moved, params, state["z"], directions)
        z = tree.map(lambda z, u: (z - u * rate).to(z.dtype), state["z"], directions)
        return updates, {"z": z, "square": square, "rate": largest, "weight": total, "count": count}, {"lr": rate, **report}

    def shown(state: Tree, params: Tree) -> Tree:
        def average(y: Tensor, z: Tensor) -> Tensor:
            return ((wide(y) - (1 - b1) * wide(z)) / b1).to(y.dtype)

        return tree.map(average, params, state["z"])

    clip = [] if max_norm is None else [clip_by_global_norm(max_norm)]
    return chain(*clip, Transform(init, update, shown=shown))
