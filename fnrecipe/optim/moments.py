"""What optimizers keep of past gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.tree import Tree


def momentum(decay: Scheduled, *, nesterov: bool = False, average: bool = False) -> Transform:
    """The sum of all gradients, each `decay` times smaller a step; or their running mean, with `average`.

    With `nesterov` the gradient of the step is counted once more, as it will be in the next step. (Polyak 1964; Sutskever et
    al. 2013.) A decay that changes over steps is reported as `momentum`. State: `mean`, like the parameters.
    """
    if callable(decay):
        return _scheduled_momentum(decay, nesterov, average)
    weight = 1 - decay if average else 1.0

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        mean = tree.map(lambda m, g: torch.add(m * decay, g, alpha=weight), state["mean"], gradients)
        direction = tree.map(lambda m, g: torch.add(m * decay, g, alpha=weight), mean, gradients) if nesterov else mean
        return direction, {"mean": mean}, {}

    return Transform(lambda params: zeros(params, "mean"), update)


def _scheduled_momentum(schedule: Schedule, nesterov: bool, average: bool) -> Transform:
    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        decay = schedule(step)

        def ahead(mean: Tensor, gradient: Tensor) -> Tensor:
            now = decay.to(mean.dtype)
            return mean * now + (gradient * (1 - now) if average else gradient)

        mean = tree.map(ahead, state["mean"], gradients)
        return tree.map(ahead, mean, gradients) if nesterov else mean, {"mean": mean}, {"momentum": decay}

    return Transform(lambda params: zeros(params, "mean"), update)


def zeros(params: Tree, *names: str) -> dict[str, Tree]:
    """Zeros like the parameters under each name."""
    return {name: tree.map(torch.zeros_like, params) for name in names}


def counter(params: Tree) -> Tensor:
    """0, int64 [], on the device of the parameters: how many updates are made."""
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)


def running_mean(mean: Tree, values: Tree, decay: float | Tensor) -> Tree:
    """`decay`, a number or float64 [], times the mean, and the rest of `values`."""
    if isinstance(decay, Tensor):
        rest = 1 - decay
        return tree.map(lambda m, v: torch.lerp(m, v, rest.to(m.dtype)), mean, values)
    return tree.map(lambda m, v: torch.lerp(m, v, 1 - decay), mean, values)


def running_square(square: Tree, values: Tree, decay: float) -> Tree:
    """The same of squares."""
    return tree.map(lambda s, v: torch.addcmul(s * decay, v, v, value=1 - decay), square, values)
