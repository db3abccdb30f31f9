"""NAdamW; defaults are those of torch.optim.NAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class NAdamWConfig:
    lr: NonNegative = 2e-3
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum_decay: NonNegative = 4e-3
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False
    cautious_weight_decay: bool = False


def nadamw(config: NAdamWConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.descent(
        optim.scale_by_nadam(*config.betas, config.eps, config.momentum_decay),
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(NAdamWConfig, nadamw, moments=2, transfers=True, low_precision=True)
