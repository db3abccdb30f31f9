"""Warm-up, then a power of what is left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import NonNegative, Positive
from fnrecipe.config.sections.optim import WarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class PolynomialDecayConfig(WarmUp):
    ENDS = True
    power: Positive = 1.0
    start_lr: NonNegative = 0.0
    final_lr: NonNegative = 0.0


def polynomial_decay(config: PolynomialDecayConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    last = num_steps or 1
    return partial(
        optim.polynomial_decay,
        num_warmup_steps=config.warmup(last),
        num_steps=last,
        power=config.power,
        start_lr=config.start_lr,
        final_lr=config.final_lr,
    )


lr_scheduler = LRScheduler(PolynomialDecayConfig, polynomial_decay)
