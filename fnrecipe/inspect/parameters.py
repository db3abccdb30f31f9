"""The parameters of a recipe by what is done with them: which group's optimizer trains them, or that they are frozen."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from attrs import AttrsInstance
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.build import trained
from fnrecipe.components.groups import members, parts
from fnrecipe.config import ModelSection, OptimizerSection
from fnrecipe.models.parameters import pattern
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipe import C, Recipe


@attrs.frozen
class Share:
    """Parameters to which the same is done.

    name       that of the group; "others" beside groups, "trained" without; or "frozen"
    optimizer, lr_scale, weight_decay   in words; empty of what is frozen, or where the config has no optimizer
    patterns   of their paths, in which `*` is the number of a layer
    tensors    how many they are
    size       numbers in them
    """

    name: str
    optimizer: str
    lr_scale: str
    weight_decay: str
    patterns: tuple[str, ...]
    tensors: int
    size: int


def shares(recipe: Recipe[C], config: C) -> list[Share]:
    """All parameters, those of groups first; none of them is made.

    Raises:
        ConfigError: if a pattern of a group is that of no parameter.
    """
    params = recipe.init(config, random.key(config.common.seed, torch.device("meta")), replicated)
    leaves = tree.paths(params)
    is_trained = trained(recipe, config)
    moved = {path: leaf for path, leaf in leaves.items() if is_trained(path, leaf)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in moved}
    section = getattr(config, "optimizer", None)
    if isinstance(section, OptimizerSection):
        model = getattr(config, "model", None)
        found = [*_trained(section, model if isinstance(model, ModelSection) else None, moved)]
    else:
        found = [_share("trained", "", "", "", moved)]
    return [*found, *([_share("frozen", "", "", "", frozen)] if frozen else [])]


def _trained(section: OptimizerSection, model: ModelSection | None, params: dict[str, Tensor]) -> Iterator[Share]:
    found = parts(section, model)
    for part, paths in zip(found, members(found, section.groups, model, params), strict=True):
        if paths:
            label = part.label or ("others" if len(found) > 1 else "trained")
            those = {path: leaf for path, leaf in params.items() if path in paths}
            yield _share(label, part.optimizer, f"x {part.lr_scale:g}", _decay(part.config), those)


def _decay(config: AttrsInstance) -> str:
    """What decays, by the config of an optimizer; one that does not say so is asked nothing."""
    decay = getattr(config, "weight_decay", None)
    if not decay:
        return "" if decay is None else "0"
    return f"{decay:g}" if getattr(config, "decay_vectors", False) else f"{decay:g}, of matrices"


def _share(name: str, optimizer: str, lr_scale: str, weight_decay: str, params: dict[str, Tensor]) -> Share:
    patterns = tuple(dict.fromkeys(map(pattern, params)))
    size = sum(leaf.numel() for leaf in params.values())
    return Share(name, optimizer, lr_scale, weight_decay, patterns, len(params), size)
