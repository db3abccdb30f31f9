"""The update and the loss: optimizer, schedule and criterion, each of them a component that is found by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs
from attrs import AttrsInstance, Factory, field, frozen

from fnrecipe.config.bounds import NonNegative, NonNegativeInt, Positive, ProperFraction, StepFraction
from fnrecipe.config.find import Kind, find_component, known
from fnrecipe.config.patterns import tag_conflicts
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


@frozen
class NoConfig:
    """The config of a group that has no optimizer of its own."""


@frozen
class OptimizerGroup(Tagged):
    """Parameters with an optimizer of their own, on the same schedule; or with another rate and decay of the section's.

    params        patterns of paths, and tags (`fnrecipe.config.patterns`)
    name          null: that of the section
    lr_scale      the factor of its learning rate, at each step
    weight_decay  null: that of the section's config; else that of all these parameters, vectors too
    """

    params: tuple[str, ...] = ()
    name: str | None = None
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))
    lr_scale: Positive = 1.0
    weight_decay: NonNegative | None = None

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        own = tags["name"] is not None
        return [("default", find_tagged("name", tags["name"], OPTIMIZERS).config() if own else NoConfig())]

    @property
    def label(self) -> str:
        return ",".join(self.params)

    def conflicts(self) -> Iterator[Problem]:
        if not self.params:
            yield Problem("params", "a pattern of parameters' paths, or a tag", "none")
        yield from tag_conflicts("params", self.params)
        if self.name is not None:
            beside = f"beside the name {self.name}, whose config says it"
            if self.lr_scale != 1:
                yield Problem("lr_scale", f"1 {beside}", f"{self.lr_scale:g}")
            if self.weight_decay is not None:
                yield Problem("weight_decay", f"null {beside}", f"{self.weight_decay:g}")


@frozen
class OptimizerSection(Tagged):
    """
    state_dtype   in which moments of matrices are kept between updates; null: as the parameters are
    weight_decay_scheduler   what becomes of weight decays over steps, as of the rate by `lr_scheduler`; null: they stay
    momentum_scheduler       the same of momenta, or first betas, of those optimizers that say which they have
    groups   parameters that differ; the first that fits a parameter has it, and the optimizer itself has the rest
    """

    name: str = "adamw"
    config: AttrsInstance = field(default=Factory(Tagged.default_config, takes_self=True))
    state_dtype: Literal["bfloat16", "8bit"] | None = None
    weight_decay_scheduler: LRSchedulerSection | None = None
    momentum_scheduler: LRSchedulerSection | None = None
    groups: tuple[OptimizerGroup, ...] = ()

    @classmethod
    def bases(cls, tags: Tags) -> list[tuple[str, AttrsInstance]]:
        return [("default", find_tagged("name", tags["name"], OPTIMIZERS).config())]

    def of(self, group: OptimizerGroup) -> tuple[str, AttrsInstance]:
        """The name and the config of a group's optimizer."""
        if group.name is not None:
            return group.name, group.config
        return self.name, self.config if group.weight_decay is None else _decaying(self.config, group.weight_decay)

    def conflicts(self) -> Iterator[Problem]:
        decays = {f"groups[{n}].weight_decay": group.weight_decay for n, group in enumerate(self.groups)}
        given = {path: f"{decay:g}" for path, decay in decays.items() if decay is not None}
        if self.weight_decay_scheduler is not None:
            given["weight_decay_scheduler"] = self.weight_decay_scheduler.name
        for path, value in given.items() if not _has_decay(self.config) else ():
            yield Problem(path, f"null for optimizer.name={self.name}, whose config has no weight_decay", value)
        if self.momentum_scheduler is not None:
            yield from self._momentum_conflicts(self.momentum_scheduler)
        names = dict.fromkeys([self.name, *(self.of(group)[0] for group in self.groups)])
        for name in names if self.state_dtype is not None else ():
            if not find_component(name, OPTIMIZERS).low_precision:
                expected = f"null for the optimizer {name}, which keeps more than moments of single elements"
                yield Problem("state_dtype", expected, repr(self.state_dtype))

    def _momentum_conflicts(self, scheduler: LRSchedulerSection) -> Iterator[Problem]:
        owners = {f"groups[{n}].": (group.name, group.config) for n, group in enumerate(self.groups) if group.name is not None}
        for path, (name, config) in {"": (self.name, self.config), **owners}.items():
            momentum = find_component(name, OPTIMIZERS).momentum
            if momentum is None:
                have = ", ".join(each for each in known(OPTIMIZERS) if find_component(each, OPTIMIZERS).momentum)
                expected = f"an optimizer whose momentum may change beside optimizer.momentum_scheduler, {have}"
                yield Problem(f"{path}name", expected, repr(name))
            elif momentum(config) == 0:
                expected = f"null where the momentum of optimizer.{path}config is 0"
                yield Problem("momentum_scheduler", expected, scheduler.name)
        for key, value in attrs.asdict(scheduler.config, recurse=False).items():
            if key in ("start_lr", "final_lr") and value >= 1:
                yield Problem(f"momentum_scheduler.config.{key}", "a momentum, less than 1", f"{value:g}")
            if key in ("start_lr_scale", "final_lr_scale", "lr_mul") and value > 1:
                expected = "at most 1, or momentum would be more than that of the optimizer"
                yield Problem(f"momentum_scheduler.config.{key}", expected, f"{value:g}")


def _has_decay(config: AttrsInstance) -> bool:
    return any(field.name == "weight_decay" for field in attrs.fields(type(config)))


def _decaying(config: AttrsInstance, weight_decay: float) -> AttrsInstance:
    """The config of an optimizer, and those in it, by which all parameters decay so."""
    new = {"weight_decay": weight_decay, "decay_vectors": True}
    values = {each.name: getattr(config, each.name) for each in attrs.fields(type(config))}
    inner = {name: _decaying(value, weight_decay) for name, value in values.items() if attrs.has(type(value))}
    changed = {name: value for name, value in new.items() if name in values}
    return attrs.evolve(config, **changed, **inner)  # type: ignore[misc]
