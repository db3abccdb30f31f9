"""Averages of the parameters over steps, kept beside them: exponential, or of all steps from one on (the tail).

The k-th parameters that are averaged, p, count by a weight w: `mean += w * (p - mean)`.

    uniform      w = 1 / k: the mean of all (Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407)
    exponential  w = (1 - decay) / (1 - decay ** k): as the moments of Adam (Kingma & Ba 2015) without their bias to 0. So the
                 first few count nearly alike, and no warm-up of the decay is needed

Both have w = 1 for the first: what the mean begins as does not matter.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim import stochastic_rounding
from fnrecipe.tree import Tree


@attrs.frozen
class Averaging:
    """Which steps are averaged: every `every`-th behind step `start`; `decay`: None: uniformly."""

    decay: float | None = None
    start: int = 0
    every: int = 1


@tree.node
@attrs.frozen(eq=False)
class Average:
    """`mean`, like the parameters, but in float32 at least; and of how many steps it is, `count`, int64 [].

    Where `count` is 0, `mean` is the parameters themselves.
    """

    mean: Tree
    count: Tensor


def init_average(params: Tree) -> Average:
    leaves = tree.leaves(params)
    count = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    return Average(tree.map(lambda leaf: stochastic_rounding.wide(leaf).clone(), params), count)


def update_average(averaging: Averaging, average: Average, params: Tree, step: Tensor, made: Tensor) -> Average:
    """The average behind `step`, int64 [], if that was `made`, bool []; else as it was."""
    behind = step - averaging.start
    due = made & (behind > 0) & (behind % averaging.every == 0)
    number = (average.count + 1).to(torch.float64)
    decay = averaging.decay
    weight = 1 / number if decay is None else (1 - decay) / (1 - torch.pow(decay, number))
    taken = due | (made & (average.count == 0))

    def leaf(mean: Tensor, parameter: Tensor) -> Tensor:
        new = torch.lerp(mean, parameter.to(mean.dtype), weight.to(mean.dtype))
        return torch.where(taken, new, mean)

    return Average(tree.map(leaf, average.mean, params), torch.where(due, average.count + 1, average.count))
