"""Gradient descent with momentum; defaults are those of torch.optim.SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class SGDConfig:
    """`weight_decay` is L2 regularisation: it goes through the momentum."""

    lr: NonNegative = 1e-3
    momentum: ProperFraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False


def sgd(config: SGDConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.sgd(
        schedule(config.lr),
        decay=schedule.momentum(config.momentum),
        nesterov=config.nesterov,
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
    )


optimizer = Optimizer(SGDConfig, sgd, momentum=lambda config: config.momentum, low_precision=True)
