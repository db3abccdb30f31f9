"""AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class AdamWConfig:
    lr: NonNegative = 3e-4
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    decay_vectors: bool = False
    cautious_weight_decay: bool = False


def adamw(config: AdamWConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.adamw(
        schedule(config.lr),
        betas=(schedule.momentum(config.betas[0]), config.betas[1]),
        eps=config.eps,
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(
    AdamWConfig, adamw, moments=2, momentum=lambda config: config.betas[0], transfers=True, low_precision=True
)
