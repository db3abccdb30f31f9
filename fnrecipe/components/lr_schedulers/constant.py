"""Warm-up, then a constant rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import NonNegative
from fnrecipe.config.sections.optim import OpenWarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class ConstantConfig(OpenWarmUp):
    start_lr: NonNegative = 0.0


def constant(config: ConstantConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    return partial(optim.constant, num_warmup_steps=config.warmup(num_steps or 1), start_lr=config.start_lr)


lr_scheduler = LRScheduler(ConstantConfig, constant)
