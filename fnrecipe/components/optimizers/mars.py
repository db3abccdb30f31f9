"""MARS-AdamW for matrices, AdamW for vectors; defaults are those of the authors' code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class MARSConfig:
    """`vector_betas`: those of vectors, whose gradients are not corrected."""

    lr: NonNegative = 3e-3
    betas: tuple[ProperFraction, ProperFraction] = (0.95, 0.99)
    vector_betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.95)
    gamma: NonNegative = 0.025
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False
    cautious_weight_decay: bool = False


def mars(config: MARSConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    corrected = optim.scale_by_mars(*config.betas, config.eps, gamma=config.gamma)
    adam = optim.scale_by_adam(*config.vector_betas, config.eps)
    return optim.descent(
        optim.split(lambda path, parameter: parameter.ndim > 1, corrected, adam),
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(MARSConfig, mars, moments=2, low_precision=True)
