"""Lion; defaults are those of its authors' code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class LionConfig:
    lr: NonNegative = 1e-4
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False
    cautious_weight_decay: bool = False


def lion(config: LionConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.descent(
        optim.scale_by_lion(schedule.momentum(config.betas[0]), config.betas[1]),
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(LionConfig, lion, moments=1, momentum=lambda config: config.betas[0], transfers=True, low_precision=True)
