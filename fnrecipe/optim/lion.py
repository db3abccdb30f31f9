"""Lion: the sign of momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import running_mean, zeros
from fnrecipe.optim.schedule import Scheduled
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.tree import Tree


def scale_by_lion(b1: Scheduled = 0.9, b2: float = 0.99) -> Transform:
    """The sign of a running mean at `b1` that begins, at each step, from one at `b2` (Chen et al. 2023, arXiv:2302.06675).

    State: `mean`, like the parameters. Its elements all have size 1: rates are 3 to 10 times smaller than those of AdamW, and
    weight decay as much larger. A `b1` that changes over steps is reported as `momentum`.
    """

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        now = b1(step) if callable(b1) else b1
        direction = tree.map(torch.sign, running_mean(state["mean"], gradients, now))
        report = {"momentum": now} if isinstance(now, Tensor) else {}
        return direction, {"mean": running_mean(state["mean"], gradients, b2)}, report

    return Transform(lambda params: zeros(params, "mean"), update)
