"""Warm-up, then the inverse square root of the step, scaled by the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.sections.optim import OpenWarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class NoamConfig(OpenWarmUp):
    pass


def noam(config: NoamConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    return partial(optim.noam, num_warmup_steps=config.warmup(num_steps or 1))


lr_scheduler = LRScheduler(NoamConfig, noam)
