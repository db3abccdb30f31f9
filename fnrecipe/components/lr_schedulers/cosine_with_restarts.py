"""Warm-up, then cycles, each half a cosine from a peak of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import AtLeastOne, Fraction, Positive, PositiveInt
from fnrecipe.config.sections.optim import OpenWarmUp
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class CosineWithRestartsConfig(OpenWarmUp):
    """`cycle_len`: steps of the first cycle; null: all that `regime.num_steps` leaves after warm-up."""

    cycle_len: PositiveInt | None = None
    cycle_mul: AtLeastOne = 1.0
    lr_mul: Positive = 1.0
    final_lr_scale: Fraction = 0.1

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        if num_steps is None and self.cycle_len is None:
            yield Problem("cycle_len", "a number where regime.num_steps is null", "null")
        yield from OpenWarmUp.conflicts_over(self, num_steps)


def cosine_with_restarts(config: CosineWithRestartsConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    warmup, last = config.warmup(num_steps or 1), num_steps or 1
    return partial(
        optim.cosine_with_restarts,
        num_warmup_steps=warmup,
        cycle_len=config.cycle_len or max(last - max(warmup, 1), 1),
        cycle_mul=config.cycle_mul,
        lr_mul=config.lr_mul,
        final_scale=config.final_lr_scale,
    )


lr_scheduler = LRScheduler(CosineWithRestartsConfig, cosine_with_restarts)
