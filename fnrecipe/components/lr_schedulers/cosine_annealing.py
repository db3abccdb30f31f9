"""Warm-up, then half a cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import Fraction, PositiveInt
from fnrecipe.config.sections.optim import WarmUp
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class CosineAnnealingConfig(WarmUp):
    """`num_warmup_steps`: a number of steps, or a fraction of all steps (`schedule_steps`).

    `cycle_len`: steps from the peak to the final rate; null: all that `regime.num_steps` leaves after warm-up.
    """

    cycle_len: PositiveInt | None = None
    final_lr_scale: Fraction = 0.1

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        if num_steps is None and self.cycle_len is None:
            yield Problem("cycle_len", "a number where regime.num_steps is null", "null")
        yield from WarmUp.conflicts_over(self, num_steps)


def schedule_steps(schedule: CosineAnnealingConfig, num_steps: int | None) -> tuple[int, int]:
    """Steps of warm-up, and steps up to the final rate, of a training of `num_steps` steps.

    A fraction of warm-up is one of `num_steps`, or, where that is None, of warm-up and cycle together; it is rounded, but never
    up to all steps.
    """
    written, cycle = schedule.num_warmup_steps, schedule.cycle_len
    if num_steps is None and isinstance(written, float):
        warmup = round((cycle or 0) * written / (1 - written))
    else:
        warmup = schedule.warmup(num_steps or 1)
    return warmup, warmup + cycle if cycle else num_steps or 1


def cosine_annealing(config: CosineAnnealingConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    warmup, last = schedule_steps(config, num_steps)
    return partial(optim.cosine_annealing, num_warmup_steps=warmup, num_steps=last, final_scale=config.final_lr_scale)


lr_scheduler = LRScheduler(CosineAnnealingConfig, cosine_annealing)
