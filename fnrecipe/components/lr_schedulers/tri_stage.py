"""A line up, a constant rate, an exponential down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import Fraction, Positive
from fnrecipe.config.sections.optim import ScheduleConfig
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class TriStageConfig(ScheduleConfig):
    """`stage_ratio`: the shares of the stages in `regime.num_steps`."""

    ENDS = True
    stage_ratio: tuple[Fraction, Fraction, Fraction] = (0.0, 0.0, 1.0)
    start_lr_scale: Fraction = 0.01
    final_lr_scale: Positive = 0.01

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        if not math.isclose(sum(self.stage_ratio), 1):
            yield Problem("stage_ratio", "three numbers whose sum is 1", str(list(self.stage_ratio)))


def tri_stage(config: TriStageConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    return partial(
        optim.tri_stage,
        num_steps=num_steps or 1,
        stage_ratio=config.stage_ratio,
        start_scale=config.start_lr_scale,
        final_scale=config.final_lr_scale,
    )


lr_scheduler = LRScheduler(TriStageConfig, tri_stage)
