"""Warm-up, stable, decay: no length of the training is built into the rates before the decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from fnrecipe.components.component import LRScheduler
from fnrecipe.config.bounds import Fraction, NonNegative, NonNegativeInt, StepFraction
from fnrecipe.config.sections.optim import WarmUp
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedule


@frozen
class WSDConfig(WarmUp):
    """`num_decay_steps`: the last steps, in which the rate falls; a number, or a fraction of `regime.num_steps`, rounded."""

    num_decay_steps: NonNegativeInt | StepFraction = 0.2
    final_lr_scale: Fraction = 0.0
    decay_type: Literal["linear", "1-sqrt", "cosine"] = "linear"
    start_lr: NonNegative = 0.0

    def decay(self, num_steps: int) -> int:
        written = self.num_decay_steps
        return written if isinstance(written, int) else round(written * num_steps)

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        yield from WarmUp.conflicts_over(self, num_steps)
        if num_steps is None and self.num_decay_steps:
            yield Problem("num_decay_steps", "0 where regime.num_steps is null", str(self.num_decay_steps))
        elif num_steps is None and isinstance(self.num_warmup_steps, float):
            yield Problem("num_warmup_steps", "an integer where regime.num_steps is null", str(self.num_warmup_steps))
        elif num_steps is not None and self.num_warmup_steps < num_steps:
            left = num_steps - self.warmup(num_steps)
            if self.decay(num_steps) > left:
                expected = f"at most the {left} steps that warm-up leaves of regime.num_steps = {num_steps}"
                yield Problem("num_decay_steps", expected, str(self.num_decay_steps))


def wsd(config: WSDConfig, num_steps: int | None) -> Callable[[float], Schedule]:
    from fnrecipe import optim

    last = 1 if num_steps is None else num_steps
    return partial(
        optim.wsd,
        num_warmup_steps=config.warmup(last),
        num_decay_steps=config.decay(last),
        num_steps=last,
        final_scale=config.final_lr_scale,
        decay_type=config.decay_type,
        start_lr=config.start_lr,
    )


lr_scheduler = LRScheduler(WSDConfig, wsd)
