"""Warm-up, then a line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import Fraction
from fnrecipe.config.sections.optim import WarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class LinearConfig(WarmUp):
    ENDS = True
    final_lr_scale: Fraction = 0.0


def linear(config: LinearConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    last = num_steps or 1
    return partial(optim.linear, num_warmup_steps=config.warmup(last), num_steps=last, final_scale=config.final_lr_scale)


lr_scheduler = LRScheduler(LinearConfig, linear)
