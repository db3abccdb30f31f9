"""From a recipe, its config and a mesh to what is folded: the state, the functions and the batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch

from fnrecipe import random, tree
from fnrecipe.data import Batch, Place, Source, pipe, prefetch, spread
from fnrecipe.loss import Sums
from fnrecipe.loss_scale import LossScaling
from fnrecipe.parts import Mesh
from fnrecipe.recipe import Recipe
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import Backend, evaluation, interpreter, jit
from fnrecipe.tree import Tree


def first_state(recipe: Recipe[Any], config: Any, mesh: Mesh, device: torch.device) -> State:
    """The state before the first step."""
    key = random.key(config.common.seed, device)
    params = recipe.init(config, random.fold_in(key, "init"), mesh.cut)
    return init_state(params, recipe.update(config), key, _scaling(config))


def plain_step(recipe: Recipe[Any], config: Any, mesh: Mesh) -> Step:
    """The train step over a mesh, as it is before tracing."""
    update = recipe.update(config)
    if config.trainer.jit == "inductor":  # it makes a kernel of the update by itself, and reads the gradients once
        update = attrs.evolve(update, apply=None)
    return train_step(recipe.loss(config), update, _leaves(config, mesh), mesh, _scaling(config))


def functions(
    recipe: Recipe[Any], config: Any, mesh: Mesh, backend: Backend = interpreter
) -> tuple[Step, Callable[[Tree, Batch], Sums]]:
    """The train step and the evaluation of a recipe over a mesh, traced and run by `backend` unless the config says no."""
    step, evaluate = plain_step(recipe, config, mesh), evaluation(recipe.loss(config), _leaves(config, mesh), mesh)
    if config.trainer.jit == "off":
        return step, evaluate
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


def _scaling(config: Any) -> LossScaling | None:
    return LossScaling(*config.trainer.fp16_loss_scale) if config.trainer.dtype == "float16" else None


def _leaves(config: Any, mesh: Mesh) -> int:
    leaves: int = config.gang.num_leaves // (mesh.replica.size * mesh.shard.size)
    return leaves
