"""Adafactor; defaults are those of torch.optim.Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import AtLeastOne, NonNegative, NonPositive, Positive

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class AdafactorConfig:
    """`eps`: the least root of a mean of squares, null for that of the dtype; and the least size of a parameter."""

    lr: NonNegative = 1e-2
    beta2_decay: NonPositive = -0.8
    eps: tuple[Positive | None, Positive] = (None, 1e-3)
    d: AtLeastOne = 1.0
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False


def adafactor(config: AdafactorConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.adafactor(
        schedule(config.lr),
        beta2_decay=config.beta2_decay,
        eps=config.eps,
        d=config.d,
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
    )


optimizer = Optimizer(AdafactorConfig, adafactor)
