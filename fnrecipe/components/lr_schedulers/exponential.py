"""A power, from a multiple of the rate to another: a sweep, or a decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.config.sections.optim import ScheduleConfig
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class ExponentialConfig(ScheduleConfig):
    """The multiples are those of the steps `first_step` and `last_step`; null: the last of `regime.num_steps`."""

    start_lr_scale: Positive = 1.0
    final_lr_scale: Positive = 0.01
    first_step: PositiveInt = 1
    last_step: PositiveInt | None = None

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        last = num_steps if self.last_step is None else self.last_step
        if last is None:
            yield Problem("last_step", "an integer where regime.num_steps is null", "null")
        elif last <= self.first_step:
            yield Problem("first_step", f"less than the last step, {last}", str(self.first_step))


def exponential(config: ExponentialConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    return partial(
        optim.exponential,
        start_scale=config.start_lr_scale,
        final_scale=config.final_lr_scale,
        first_step=config.first_step,
        last_step=config.last_step or num_steps or config.first_step + 1,
    )


lr_scheduler = LRScheduler(ExponentialConfig, exponential)
