"""From a recipe, its config and a mesh to what is folded: the state, the functions and the batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch

from fnrecipe import random, tree
from fnrecipe.compiler import Backend, cuda_graph
from fnrecipe.compiler.modes import BACKENDS, JitMode, jit_mode
from fnrecipe.compiler.pure import without_draws
from fnrecipe.config import ShellConfig
from fnrecipe.data import Batch, LaneAssignment, Source, in_worker_processes, map_items, pipe, prefetch, watch_padding
from fnrecipe.errors import UsageError
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim import Transform
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import C, Recipe
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import evaluation, jit
from fnrecipe.tree import Tree

tree.node(Batch)


def init_train_state(recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device) -> State:
    """The state before the first step."""
    key = random.key(config.common.seed, device)
    params = recipe.init(config, random.fold_in(key, "init"), mesh.cut)
    return init_state(params, recipe.update(config), key, _scaling(config), partial(recipe.trains, config))


def plain_step(recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device) -> Step:
    """The train step over a mesh, as it is before it is traced for a device."""
    update = without_fused_update(recipe.update(config), jit_mode(config.trainer.jit, device))
    share, trains = _local_microbatches(config, mesh), partial(recipe.trains, config)
    return train_step(recipe.loss(config), update, share, mesh, _scaling(config), trains)


def make_step(
    recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device, with_progress: Callable[[Backend], Backend] = lambda b: b
) -> Step:
    """The train step of a recipe over a mesh, as `trainer.jit` says; `with_progress` may wrap what runs its graph.

    Raises:
        UsageError: for a CUDA graph on another device, or of several ranks, whose collectives have not been captured.
    """
    if config.trainer.cuda_graph and (device.type != "cuda" or mesh.ranks > 1):
        where = f"several ranks ({mesh.ranks})" if mesh.ranks > 1 else f"the device {device.type}"
        raise UsageError(f"trainer.cuda_graph: expected false for {where}, found true")
    step, mode = plain_step(recipe, config, mesh, device), jit_mode(config.trainer.jit, device)
    if mode == "off":
        return without_draws(step)
    backend = with_progress(BACKENDS[mode])
    return jit(step, donate=1, backend=cuda_graph(backend) if config.trainer.cuda_graph else backend)


def make_evaluation(
    loss: Loss, config: ShellConfig, mesh: Mesh, device: torch.device, with_progress: Callable[[Backend], Backend] = lambda b: b
) -> Callable[[Tree, Any], Sums]:
    """`(params, batch) -> sums` of a loss over a mesh, run as the train step is."""
    sums, mode = evaluation(loss, _local_microbatches(config, mesh), mesh), jit_mode(config.trainer.jit, device)
    return without_draws(sums) if mode == "off" else jit(sums, backend=with_progress(BACKENDS[mode]))


def batches(recipe: Recipe[C], config: C, assignment: LaneAssignment, device: torch.device) -> Source[Batch]:
    """The training batches as tensors of the host, read ahead in processes or a thread as the config says."""
    dataset, make = config.dataset, partial(recipe.stream, config)
    on_host = partial(map_items, function=partial(to_host, device=device))
    if dataset.num_workers:
        workers = partial(in_worker_processes, make, assignment=assignment, workers=dataset.num_workers, size=dataset.prefetch)
        return pipe(workers, watch_padding, on_host)
    return pipe(make(assignment), watch_padding, on_host, partial(prefetch, size=dataset.prefetch))


def to_host(batch: Batch, device: torch.device) -> Batch:
    """A batch of arrays as tensors of the host; for CUDA in pinned memory, from which they are copied without waiting."""
    tensors: Batch = tree.map(torch.from_numpy, batch)
    return tree.map(torch.Tensor.pin_memory, tensors) if device.type == "cuda" else tensors


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch of tensors on a device, whose work behind this call sees them: the host does not wait for the copy."""
    tensors: Batch = tree.map(lambda tensor: tensor.to(device, non_blocking=True), batch)
    return tensors


def _scaling(config: ShellConfig) -> LossScaling | None:
    return LossScaling(*config.trainer.fp16_loss_scale) if config.trainer.dtype == "float16" else None


def _local_microbatches(config: ShellConfig, mesh: Mesh) -> int:
    count: int = config.gang.num_microbatches // (mesh.replica.size * mesh.shard.size)
    return count


def without_fused_update(update: Transform, level: JitMode) -> Transform:
    """The update as the level wants it: Inductor makes a kernel of the whole by itself, and reads the gradients once."""
    return attrs.evolve(update, fused_update=None) if level == "inductor" else update
