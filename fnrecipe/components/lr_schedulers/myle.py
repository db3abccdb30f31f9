"""Warm-up, then the inverse square root of the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import NonNegative, NonNegativeInt, StepFraction
from fnrecipe.config.sections.optim import OpenWarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class MyleConfig(OpenWarmUp):
    num_warmup_steps: NonNegativeInt | StepFraction = 1
    start_lr: NonNegative = 0.0


def myle(config: MyleConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    warmup = config.warmup(num_steps or 1)
    return partial(optim.inverse_sqrt, num_warmup_steps=warmup, timescale=max(warmup, 1), start_lr=config.start_lr)


lr_scheduler = LRScheduler(MyleConfig, myle)
