"""Dynamic loss scaling, for activations in float16: what is differentiated is the loss times a factor that is found by trial.

float16 knows nothing between 0 and 6e-8, where many gradients lie, and nothing above 65,504. (Micikevicius et al. 2018,
arXiv:1710.03740.) The factor is a part of the state. Whoever divides gradients by a count divides by the factor as well.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.loss import Loss, Sums
from fnrecipe.tree import Tree


@attrs.frozen
class LossScaling:
    """How the factor changes: it is halved by a step that is not finite, and doubled after `interval` good ones in a row.

    initial, minimum  the first factor, and what it never falls below; powers of two round nothing
    """

    initial: float
    minimum: float
    interval: int = 2000


@tree.node
@attrs.frozen(eq=False)
class LossScale:
    """The factor `value`, float32 [], and how many finite steps there were in a row, int64 []."""

    value: Tensor
    good: Tensor


def init_scale(scaling: LossScaling, device: torch.device) -> LossScale:
    return LossScale(
        torch.tensor(scaling.initial, dtype=torch.float32, device=device), torch.zeros((), dtype=torch.int64, device=device)
    )


def scale_loss(loss: Loss, scale: LossScale | tuple[()]) -> Loss:
    """`loss`, whose first result is multiplied if there is a scale; its sums are as they were."""
    if not isinstance(scale, LossScale):
        return loss

    def times(params: Tree, batch: Tree, key: Tensor | None) -> tuple[Tensor, Sums]:
        total, sums = loss(params, batch, key)
        return total * scale.value, sums

    return times


def update_scale(scaling: LossScaling, scale: LossScale, finite: Tensor) -> tuple[LossScale, Tensor]:
    """The scale after a step that was `finite` or not (bool []), and whether that has halved it (bool []).

    It is not halved where the half would be below the minimum, and not doubled where float32 ends.
    """
    good = torch.where(finite, scale.good + 1, 0)
    half, double, due = scale.value * 0.5, scale.value * 2, good == scaling.interval
    halved = ~finite & (half >= scaling.minimum)
    value = torch.where(halved, half, torch.where(due & torch.isfinite(double), double, scale.value))
    return LossScale(value, torch.where(due, 0, good)), halved
