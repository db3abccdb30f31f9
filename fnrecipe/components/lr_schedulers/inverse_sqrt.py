"""Warm-up, then an inverse square root with a time scale of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import PositiveInt
from fnrecipe.config.sections.optim import OpenWarmUp

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class InverseSqrtConfig(OpenWarmUp):
    """`timescale`: steps from the peak to peak / √2; null: those of warm-up, or 10,000 without it."""

    timescale: PositiveInt | None = None


def inverse_sqrt(config: InverseSqrtConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    warmup = config.warmup(num_steps or 1)
    return partial(optim.inverse_sqrt, num_warmup_steps=warmup, timescale=config.timescale or warmup or 10_000)


lr_scheduler = LRScheduler(InverseSqrtConfig, inverse_sqrt)
