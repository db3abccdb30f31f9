"""From a recipe, its config and a mesh to what is folded: the state, the functions and the batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fnrecipe import random, tree
from fnrecipe.data import Batch, Place, Source, pipe, prefetch, spread
from fnrecipe.level import BACKENDS, Level, fitting
from fnrecipe.loss import Sums
from fnrecipe.parts import Mesh
from fnrecipe.recipe import Recipe
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import Backend, evaluation, jit
from fnrecipe.tree import Tree


def first_state(recipe: Recipe[Any], config: Any, mesh: Mesh, device: torch.device) -> State:
    """The state before the first step."""
    key = random.key(config.common.seed, device)
    params = recipe.init(config, random.fold_in(key, "init"), mesh.cut)
    return init_state(params, recipe.update(config), key)


def plain_step(recipe: Recipe[Any], config: Any, mesh: Mesh, level: Level) -> Step:
    """The train step over a mesh, as it is before it is traced for a level."""
    update = fitting(recipe.update(config), level)
    return train_step(recipe.loss(config), update, _leaves(config, mesh), mesh)


def functions(
    recipe: Recipe[Any], config: Any, mesh: Mesh, level: Level, told: Callable[[Backend], Backend] = lambda backend: backend
) -> tuple[Step, Callable[[Tree, Batch], Sums]]:
    """The train step and the evaluation of a recipe over a mesh, at a level; `told` may wrap what runs their graphs."""
    step, evaluate = plain_step(recipe, config, mesh, level), evaluation(recipe.loss(config), _leaves(config, mesh), mesh)
    if level == "off":
        return step, evaluate
    backend = told(BACKENDS[level])
    return jit(step, donate=1, backend=backend), jit(evaluate, backend=backend)


def batches(recipe: Recipe[Any], config: Any, place: Place) -> Source[Batch]:
    """The training batches, read ahead in processes or a thread as the config says."""
    dataset, make = config.dataset, partial(recipe.stream, config)
    if dataset.num_workers:
        return partial(spread, make, place=place, workers=dataset.num_workers, size=dataset.prefetch)
    return pipe(make(place), partial(prefetch, size=dataset.prefetch))


def to_device(batch: Batch, device: torch.device) -> Batch:
    tensors: Batch = tree.map(lambda array: torch.from_numpy(array).to(device), batch)
    return tensors


def _leaves(config: Any, mesh: Mesh) -> int:
    leaves: int = config.gang.num_leaves // (mesh.replica.size * mesh.shard.size)
    return leaves
