"""Transforms of some of the parameters, chosen by path: as optax's `masked` and `multi_transform`.

What such a transform gets are the chosen parameters as one flat dict by dotted path, whose paths are those of the parameters.
(The tree itself, where all are chosen.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import UsageError, few
from fnrecipe.optim.transform import MeanGradient, Report, Transform, init_parts, update_parts
from fnrecipe.parallel.mesh import is_shard, outline
from fnrecipe.tree import Tree

Mask: TypeAlias = Callable[[str, Tensor], bool]
"""(path, parameter) -> whether it is meant. The tensor has shape and dtype of the whole parameter, and no numbers."""


Parts: TypeAlias = Callable[[Tree], Sequence[frozenset[str]]]
"""parameters -> the paths of each part of them; each parameter is in one part."""


def everything(path: str, parameter: Tensor) -> bool:
    """The mask that holds for each parameter."""
    return True


def matrices(path: str, parameter: Tensor) -> bool:
    """The mask that holds for what has more than one dimension."""
    return parameter.ndim > 1


def decaying(vectors: bool) -> Mask:
    """The mask of what decays: matrices, and `vectors` too or not."""
    return everything if vectors else matrices


def chosen(params: Tree, mask: Mask) -> frozenset[str]:
    """The paths of the parameters for which the mask holds: the same on all ranks, however parameters are cut."""
    return frozenset(path for path, leaf in tree.paths(params, is_shard).items() if mask(path, outline(leaf)))


def subset(values: Tree, paths: Container[str]) -> Tree:
    """The tensors or parts at these paths, as a flat dict by path; `values` itself if all are."""
    found = tree.paths(values, is_shard)
    return values if all(path in paths for path in found) else {path: found[path] for path in found if path in paths}


def merged(values: Tree, *subsets: Tree) -> Tree:
    """`values`, with what is in the subsets in place of what it has at the same paths."""
    leaves, spec = pytree.tree_flatten(values, is_shard)
    new = {path: leaf for part in subsets for path, leaf in tree.paths(part, is_shard).items()}
    return pytree.tree_unflatten([new.get(*pair) for pair in zip(tree.paths(values, is_shard), leaves, strict=True)], spec)


def masked(transform: Transform, mask: Mask) -> Transform:
    """`transform` of the parameters for which `mask` holds; the updates of the others are left as they are.

    The state is that of `transform`.

    Raises:
        UsageError: from `init` and `update`, if the mask holds for no parameter.
    """

    def paths_of(params: Tree) -> frozenset[str]:
        paths = chosen(params, mask)
        if not paths:
            raise UsageError(f"optim.masked: expected a parameter for which the mask holds, found none of {_few(params)}")
        return paths

    def init(params: Tree) -> Tree:
        return init_parts(transform, subset(params, paths_of(params)))

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        paths = paths_of(params)
        new, state, report = update_parts(transform, subset(updates, paths), state, subset(params, paths), step)
        return merged(updates, new), state, report

    show = transform.shown

    def shown(state: Tree, params: Tree) -> Tree:
        return merged(params, show(state, subset(params, paths_of(params)))) if show else params

    return Transform(init, update, shown=shown if show else None)


def split(mask: Mask, those: Transform, others: Transform) -> Transform:
    """`those` for the parameters for which `mask` holds, and `others` for the others; there may be none of either.

    The state is the pair of theirs, () where there are no parameters. What both report is, of the others, `NAME/others`.
    """

    def parts(params: Tree) -> list[frozenset[str]]:
        return [chosen(params, mask), chosen(params, lambda path, parameter: not mask(path, parameter))]

    return partition_by(parts, {"": those, "others": others})


def partition(transforms: Mapping[str, Transform]) -> Transform:
    """For each parameter the transform of the first pattern that fits its dotted path (`fnmatch`: `*`, `?`, `[ab]`).

    The state is the tuple of theirs, in the order of the patterns. A number that several of them report is reported as
    `NAME/PATTERN`.

    Raises:
        UsageError: from `init` and `update`, if no pattern fits a parameter, or a pattern is the first that fits for none.
    """
    return partition_by(lambda params: _assigned(params, list(transforms)), transforms)


def partition_by(parts: Parts, transforms: Mapping[str, Transform]) -> Transform:
    """Each of the transforms, by name, for one of the `parts` of the parameters.

    The state is the tuple of theirs, () where there are no parameters. A number that several of them report is reported as
    `NAME/TRANSFORM`, or as NAME for the transform called "". It is fused where all of them are.
    """

    def init(params: Tree) -> Tree:
        pairs = zip(transforms.values(), parts(params), strict=True)
        return tuple(init_parts(each, subset(params, paths)) if paths else () for each, paths in pairs)

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        found = [
            update_parts(each, subset(updates, paths), before, subset(params, paths), step) if paths else NOTHING
            for each, before, paths in zip(transforms.values(), state, parts(params), strict=True)
        ]
        return _joined(updates, list(transforms), found)

    def shown(state: Tree, params: Tree) -> Tree:
        zipped = zip(transforms.values(), state, parts(params), strict=True)
        return merged(params, *(each.shown(own, subset(params, paths)) for each, own, paths in zipped if each.shown and paths))

    whole = Transform(init, update, shown=shown if any(each.shown for each in transforms.values()) else None)
    return _fused_by(parts, transforms, whole)


def _fused_by(parts: Parts, transforms: Mapping[str, Transform], whole: Transform) -> Transform:
    """`whole`, the partition of transforms, with their fused updates if all of them have one that is bounded."""
    updates = [each.fused_update for each in transforms.values() if each.fused_update]
    bounds = [each.bounded for each in transforms.values() if each.bounded]
    if not len(updates) == len(bounds) == len(transforms):
        return whole

    def fused_update(
        gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
    ) -> tuple[Tree, Tree, Report]:
        found = [
            each(_part(gradients, paths), before, subset(params, paths), step, accept, key) if paths else NOTHING
            for each, before, paths in zip(updates, state, parts(params), strict=True)
        ]
        return _joined(params, list(transforms), found)

    def bounded(gradients: MeanGradient, state: Tree, params: Tree, step: Tensor) -> Tensor:
        zipped = zip(bounds, state, parts(params), strict=True)
        known = [each(gradients, before, subset(params, paths), step) for each, before, paths in zipped if paths]
        return torch.stack(known).all()

    return attrs.evolve(whole, fused_update=fused_update, bounded=bounded)


NOTHING: tuple[Tree, Tree, Report] = ({}, (), {})
"""What is made of no parameters."""


def _part(gradients: MeanGradient, paths: frozenset[str]) -> MeanGradient:
    """Some of the gradients; `norm` stays that of all, and so a bound of theirs."""
    return attrs.evolve(gradients, total=subset(gradients.total, paths))


def _joined(values: Tree, names: Sequence[str], found: Sequence[tuple[Tree, Tree, Report]]) -> tuple[Tree, Tree, Report]:
    new, states, reports = zip(*found, strict=True)
    return merged(values, *new), states, _named(dict(zip(names, reports, strict=True)))


def _assigned(params: Tree, patterns: Sequence[str]) -> list[frozenset[str]]:
    """The paths of the parameters that belong to each pattern."""
    found: dict[str, set[str]] = {pattern: set() for pattern in patterns}
    for path in tree.paths(params, is_shard):
        fitting = next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)
        if fitting is None:
            listed = ", ".join(map(repr, patterns))
            raise UsageError(f"optim.partition: expected a pattern that fits the parameter {path}, found {listed or 'none'}")
        found[fitting].add(path)
    if empty := [pattern for pattern, paths in found.items() if not paths]:
        others = "" if len(patterns) == 1 else " that those before it leave"
        raise UsageError(
            f"optim.partition: expected a parameter{others} for the pattern {empty[0]!r}, found none in {_few(params)}"
        )
    return [frozenset(paths) for paths in found.values()]


def _named(reports: Mapping[str, Report]) -> Report:
    """All numbers of the reports by pattern, under names of their own; those of "" keep theirs."""
    names = Counter(name for report in reports.values() for name in report)
    return {
        name if names[name] == 1 or not pattern else f"{name}/{pattern}": value
        for pattern, report in reports.items()
        for name, value in report.items()
    }


def _few(params: Tree) -> str:
    return few(list(tree.paths(params, is_shard)), 3)
