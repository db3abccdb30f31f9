"""SOAP for matrices, Adam for vectors; defaults are those of the authors' code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, NonNegativeInt, Positive, PositiveInt, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class SOAPConfig:
    """`precondition_frequency`: in which updates bases are renewed; sides above `max_precondition_dim` have none."""

    lr: NonNegative = 3e-3
    betas: tuple[ProperFraction, ProperFraction] = (0.95, 0.95)
    shampoo_beta: ProperFraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decay_vectors: bool = False
    cautious_weight_decay: bool = False
    precondition_frequency: PositiveInt = 10
    max_precondition_dim: NonNegativeInt = 10_000


def soap(config: SOAPConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    turned = optim.scale_by_soap(
        *config.betas,
        config.eps,
        shampoo_decay=config.shampoo_beta,
        every=config.precondition_frequency,
        max_dim=config.max_precondition_dim,
    )
    adam = optim.scale_by_adam(*config.betas, config.eps)
    return optim.descent(
        optim.split(lambda path, parameter: parameter.ndim == 2, turned, adam),
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(SOAPConfig, soap, moments=2)
