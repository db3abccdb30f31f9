"""Schedule-free AdamW; defaults are those of the authors' code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class ScheduleFreeConfig:
    """`power` and `rate_power`: of the number and of the rate of an update, by which it counts in the average."""

    lr: NonNegative = 2.5e-3
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    decay_vectors: bool = False
    power: NonNegative = 0.0
    rate_power: NonNegative = 2.0

    def conflicts(self) -> Iterator[Problem]:
        if self.betas[0] == 0:
            yield Problem("betas", "a first number above 0: what is averaged is between the parameters", str(list(self.betas)))


def schedule_free(config: ScheduleFreeConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    return optim.schedule_free_adamw(
        schedule(config.lr),
        betas=config.betas,
        eps=config.eps,
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        power=config.power,
        rate_power=config.rate_power,
        max_norm=max_norm,
    )


optimizer = Optimizer(ScheduleFreeConfig, schedule_free, moments=2)
