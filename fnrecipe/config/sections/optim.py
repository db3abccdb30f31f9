"""The update and the loss: optimizer, schedule and criterion, each of them a component that is found by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import attrs
from attrs import AttrsInstance, Factory, field, frozen

from fnrecipe.config.bounds import NonNegative, NonNegativeInt, ProperFraction, StepFraction
from fnrecipe.config.find import Kind
from fnrecipe.config.tagged import Tagged, Tags, find_tagged
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from fnrecipe.components.component import Criterion, LRScheduler, Optimizer

OPTIMIZERS: Kind[Optimizer[AttrsInstance]] = Kind(
    cls="fnrecipe.components.component:Optimizer",
    package="fnrecipe.components.optimizers",
    light=":optimizer",
    attribute="optimizer",
)
LR_SCHEDULERS: Kind[LRScheduler[AttrsInstance]] = Kind(
    cls="fnrecipe.components.component:LRScheduler",
    package="fnrecipe.components.lr_schedulers",
    light=":lr_scheduler",
    attribute="lr_scheduler",
)
CRITERIA: Kind[Criterion[AttrsInstance]] = Kind(
    cls="fnrecipe.components.component:Criterion",
    package="fnrecipe.components.criteria",
    light=":criterion",
    attribute="criterion",
)


@frozen
class LossSection:
    """What is minimised: nats of targets, and what is added to them.

    `length_normalization`: whether each document counts the same, and not each target.
    """

    label_smoothing: ProperFraction = 0.0
    z_loss: NonNegative = 0.0
    length_normalization: bool = False


@frozen
class CriterionSection(Tagged):
    name: str = "dpo"
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        return [("default", find_tagged("name", tags["name"], CRITERIA).config())]


@frozen
class OptimizerSection(Tagged):
    name: str = "adamw"
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        return [("default", find_tagged("name", tags["name"], OPTIMIZERS).config())]


@frozen
class ScheduleConfig:
    """The base of configs of schedules. `ENDS`: whether the rates depend on `regime.num_steps`, which then must be a number."""

    ENDS: ClassVar[bool] = False

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        """What cannot stand in a training of `num_steps` steps."""
        yield from ()


@frozen
class WarmUp(ScheduleConfig):
    """The base of configs of schedules that begin with linear warm-up, in steps or as a fraction of all steps."""

    num_warmup_steps: NonNegativeInt | StepFraction = 0

    def warmup(self, num_steps: int) -> int:
        """Steps of warm-up in a training of `num_steps`; a fraction is rounded, but never up to all steps."""
        written = self.num_warmup_steps
        return written if isinstance(written, int) else min(round(written * num_steps), num_steps - 1)

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        if num_steps is not None and self.num_warmup_steps >= num_steps:
            expected = f"less than regime.num_steps = {num_steps}, or a fraction below 1"
            yield Problem("num_warmup_steps", expected, str(self.num_warmup_steps))


@frozen
class OpenWarmUp(WarmUp):
    """The base of configs of schedules that need no number of steps, unless their warm-up is a fraction of it."""

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        yield from WarmUp.conflicts_over(self, num_steps)
        if num_steps is None and isinstance(self.num_warmup_steps, float):
            yield Problem("num_warmup_steps", "an integer where regime.num_steps is null", str(self.num_warmup_steps))


@frozen
class LRSchedulerSection(Tagged):
    name: str = "cosine_annealing"
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        return [("default", find_tagged("name", tags["name"], LR_SCHEDULERS).config())]

    def conflicts_over(self, num_steps: int | None) -> Iterator[Problem]:
        """What cannot stand in a training of `num_steps` steps."""
        if isinstance(self.config, ScheduleConfig):
            if num_steps is None and self.config.ENDS:
                yield Problem("name", "a schedule without an end where regime.num_steps is null", repr(self.name))
            for problem in self.config.conflicts_over(num_steps):
                yield attrs.evolve(problem, path=f"config.{problem.path}")
