"""The update that the section of an optimizer stands for: that of the optimizer, and those of its groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
from attrs import AttrsInstance

from fnrecipe.config import ModelSection
from fnrecipe.config.find import find_component
from fnrecipe.config.patterns import TAGS, fits
from fnrecipe.config.sections.optim import OPTIMIZERS, OptimizerGroup, OptimizerSection
from fnrecipe.errors import ConfigError, Problem, did_you_mean
from fnrecipe.models.parameters import pattern as table_pattern
from fnrecipe.models.transfer import VOCABULARY, Factors, role, rules

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.optim import Schedules, Transform

REST = ""
"""What the part is called that no group has: its numbers are reported under their own names."""


@attrs.frozen
class Part:
    """Parameters with one optimizer, rate and decay: those of a group, or of none, whose roles have the same factors.

    label  what its numbers are reported as: "" without another word
    group  the number of the group; that of all groups where none has them
    roles  by `fnrecipe.models.transfer`; without a transfer there is one
    """

    label: str
    optimizer: str
    config: AttrsInstance
    lr_scale: float
    group: int
    roles: frozenset[str]


def make_update(
    optimizer: OptimizerSection, schedules: Schedules, max_norm: float | None, model: ModelSection | None = None
) -> Transform:
    """The optimizer on its schedules, behind clipping by the global norm of all gradients; each group its own.

    Raises:
        ConfigError: from `init` and `update`, if a pattern is that of no parameter, or a group has none.
    """
    found = parts(optimizer, model)

    from fnrecipe import optim

    def make(part: Part, max_norm: float | None) -> Transform:
        made = find_component(part.optimizer, OPTIMIZERS).make(part.config, schedules.scaled(part.lr_scale), max_norm)
        return made if optimizer.state_dtype is None else optim.low_precision(made, optimizer.state_dtype)

    if len(found) == 1:
        return make(found[0], max_norm)
    transforms = {part.label: make(part, None) for part in found}
    return optim.clipped(optim.partition_by(partial(members, found, optimizer.groups, model), transforms), max_norm)


def parts(optimizer: OptimizerSection, model: ModelSection | None) -> list[Part]:
    """The parts of each group, and last those of what no group has."""
    owners = [(group.label, *optimizer.of(group), group.lr_scale) for group in optimizer.groups]
    owners.append((REST, optimizer.name, optimizer.config, 1.0))
    return [
        Part(
            label="/".join(word for word in (label, "" if roles[0] == VOCABULARY else roles[0]) if word),
            optimizer=name,
            config=_scaled(config, factors),
            lr_scale=lr_scale * factors.rate,
            group=number,
            roles=frozenset(roles),
        )
        for number, (label, name, config, lr_scale) in enumerate(owners)
        for factors, roles in _alike(name, config, model).items()
    ]


def _alike(name: str, config: AttrsInstance, model: ModelSection | None) -> dict[Factors, list[str]]:
    """Which roles have the same factors of rate, decay and epsilon under an optimizer."""
    found: dict[Factors, list[str]] = {}
    for each, factors in rules(model, find_component(name, OPTIMIZERS).width_power(config)).items():
        found.setdefault(attrs.evolve(factors, init=1.0, shift=0.0), []).append(each)
    return found


def members(
    found: Sequence[Part], groups: Sequence[OptimizerGroup], model: ModelSection | None, params: object
) -> list[frozenset[str]]:
    """The paths of the parameters of each part.

    Raises:
        ConfigError: if a pattern is that of no parameter, or a group has none that those before it leave.
    """
    from fnrecipe import optim

    of_groups = _of_groups(groups, params)

    def those(part: Part) -> frozenset[str]:
        def mine(path: str, parameter: Tensor) -> bool:
            return path in of_groups[part.group] and role(model, path, parameter.ndim) in part.roles

        return optim.chosen(params, mine)

    return [those(part) for part in found]


def _of_groups(groups: Sequence[OptimizerGroup], params: object) -> list[frozenset[str]]:
    """The paths of the parameters of each group, and last of those that no group has."""
    from fnrecipe import optim

    def those(patterns: Sequence[str]) -> frozenset[str]:
        return optim.chosen(params, lambda path, parameter: fits(path, parameter.ndim, patterns))

    rest, found, problems = those(["*"]), list[frozenset[str]](), list[Problem]()
    known = {*TAGS, *map(table_pattern, rest)}
    for number, group in enumerate(groups):
        where, mine = f"optimizer.groups[{number}].params", those(group.params)
        for idle in [pattern for pattern in group.params if not those([pattern])]:
            problems.append(
                Problem(where, "patterns of parameters that are trained", repr(idle), hint=did_you_mean(idle, known))
            )
        if mine and not mine & rest:
            problems.append(Problem(where, "a parameter that the groups before it leave", repr(group.label)))
        found.append(mine & rest)
        rest -= mine
    if problems:
        raise ConfigError(problems)
    return [*found, rest]


def _scaled(config: AttrsInstance, factors: Factors) -> AttrsInstance:
    """The config of an optimizer, and those in it, with decay and epsilon times the factors."""
    by = {"weight_decay": factors.decay, "eps": factors.eps}
    values = {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
    inner = {name: _scaled(value, factors) for name, value in values.items() if attrs.has(type(value))}
    changed = {name: values[name] * factor for name, factor in by.items() if name in values and factor != 1}
    return attrs.evolve(config, **changed, **inner)  # type: ignore[misc]
