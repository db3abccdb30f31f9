"""The update that the section of an optimizer stands for: that of the optimizer, and those of its groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from fnrecipe.config.find import find_component
from fnrecipe.config.patterns import TAGS, fits
from fnrecipe.config.sections.optim import OPTIMIZERS, OptimizerGroup, OptimizerSection
from fnrecipe.errors import ConfigError, Problem, did_you_mean
from fnrecipe.models.parameters import pattern as table_pattern

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform

REST = ""
"""What the part is called that no group has: its numbers are reported under their own names."""


def make_update(optimizer: OptimizerSection, schedules: Schedules, max_norm: float | None) -> Transform:
    """The optimizer on its schedules, behind clipping by the global norm of all gradients; each group its own.

    Raises:
        ConfigError: from `init` and `update`, if a pattern is that of no parameter, or a group has none.
    """
    main = find_component(optimizer.name, OPTIMIZERS).make
    if not optimizer.groups:
        return main(optimizer.config, schedules, max_norm)
    from fnrecipe import optim

    def make(group: OptimizerGroup) -> Transform:
        name, config = optimizer.of(group)
        return find_component(name, OPTIMIZERS).make(config, schedules.scaled(group.lr_scale), None)

    transforms = {group.label: make(group) for group in optimizer.groups}
    whole = {**transforms, REST: main(optimizer.config, schedules, None)}
    return optim.clipped(optim.partition_by(partial(parts, optimizer.groups), whole), max_norm)


def parts(groups: Sequence[OptimizerGroup], params: object) -> list[frozenset[str]]:
    """The paths of the parameters of each group, and last of those that no group has.

    Raises:
        ConfigError: if a pattern is that of no parameter, or a group has none that those before it leave.
    """
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
