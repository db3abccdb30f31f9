"""AdEMAMix; defaults are those of its authors' code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, NonNegativeInt, Positive, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class AdEMAMixConfig:
    """`num_alpha_steps` and `num_beta3_steps`: updates in which `alpha` and the third of `betas` rise to their values."""

    lr: NonNegative = 1e-3
    betas: tuple[ProperFraction, ProperFraction, ProperFraction] = (0.9, 0.999, 0.9999)
    alpha: NonNegative = 2.0
    eps: Positive = 1e-8
    num_alpha_steps: NonNegativeInt = 0
    num_beta3_steps: NonNegativeInt = 0
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False
    cautious_weight_decay: bool = False


def ademamix(config: AdEMAMixConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    direction = optim.scale_by_ademamix(
        *config.betas,
        config.alpha,
        config.eps,
        num_alpha_steps=config.num_alpha_steps,
        num_b3_steps=config.num_beta3_steps,
    )
    return optim.descent(
        direction,
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(AdEMAMixConfig, ademamix, moments=3, transfers=True, low_precision=True)
