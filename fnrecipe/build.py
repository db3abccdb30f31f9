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
from fnrecipe.contract import check_batch_size, check_params, checked_loss
from fnrecipe.data import LaneAssignment, Source, checked, in_worker_processes, map_items, pipe, prefetch
from fnrecipe.errors import UsageError
from fnrecipe.loss import Sums
from fnrecipe.optim import Transform
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import Recipe
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import evaluation, jit
from fnrecipe.tree import Tree


def init_train_state(recipe: Recipe[Any], config: Any, mesh: Mesh, device: torch.device) -> State:
    """The state before the first step."""
    key = random.key(config.common.seed, device)
    params = recipe.init(config, random.fold_in(key, "init"), mesh.cut)
    check_params(recipe.name, params)
    return init_state(params, recipe.update(config), key, _scaling(config))


def plain_step(recipe: Recipe[Any], config: Any, mesh: Mesh, device: torch.device) -> Step:
    """The train step over a mesh, as it is before it is traced for a device."""
    update = without_fused_update(recipe.update(config), jit_mode(config.trainer.jit, device))
    check_batch_size(recipe.name, config.dataset.batch_size, config.gang.num_microbatches)
    loss = checked_loss(recipe.name, recipe.loss(config))
    return train_step(loss, update, _local_microbatches(config, mesh), mesh, _scaling(config))


def make_step(
    recipe: Recipe[Any],
    config: Any,
    mesh: Mesh,
    device: torch.device,
    with_progress: Callable[[Backend], Backend] = lambda backend: backend,
) -> tuple[Step, Callable[[Tree, Tree], Sums]]:
    """The train step and the evaluation of a recipe over a mesh; `with_progress` may wrap what runs their graphs.

    Raises:
        UsageError: for a CUDA graph on another device, or of several ranks, whose collectives have not been captured.
    """
    mode = jit_mode(config.trainer.jit, device)
    if config.trainer.cuda_graph and (device.type != "cuda" or mesh.ranks > 1):
        where = f"several ranks ({mesh.ranks})" if mesh.ranks > 1 else f"the device {device.type}"
        raise UsageError(f"trainer.cuda_graph: expected false for {where}, found true")
    step, evaluate = (
        plain_step(recipe, config, mesh, device),
        evaluation(checked_loss(recipe.name, recipe.loss(config)), _local_microbatches(config, mesh), mesh),
    )
    if mode == "off":
        return step, evaluate
    backend = with_progress(BACKENDS[mode])
    of_step = cuda_graph(backend) if config.trainer.cuda_graph else backend
    return jit(step, donate=1, backend=of_step), jit(evaluate, backend=backend)


def batches(recipe: Recipe[Any], config: Any, assignment: LaneAssignment, device: torch.device) -> Source[Tree]:
    """The training batches as tensors of the host, read ahead in processes or a thread as the config says."""
    dataset, on_host = config.dataset, partial(map_items, function=partial(to_host, device=device))
    make = partial(checked, partial(recipe.stream, config), name=f"{recipe.name}.stream", batch_size=dataset.batch_size)
    if not dataset.num_workers:
        return pipe(make(assignment), on_host, partial(prefetch, size=dataset.prefetch))
    padding = recipe.example(config, assignment.split(dataset.num_workers)[0].rows(dataset.batch_size))
    ahead = partial(in_worker_processes, make, assignment=assignment, padding=padding)
    return pipe(partial(ahead, workers=dataset.num_workers, size=dataset.prefetch), on_host)


def validation_batches(recipe: Recipe[Any], config: Any, assignment: LaneAssignment, device: torch.device) -> Source[Tree]:
    """The validation batches of a recipe that has some as tensors of the host."""
    assert recipe.validate is not None
    make, name = partial(recipe.validate, config), f"{recipe.name}.validate"
    source = checked(make, assignment, name=name, batch_size=config.dataset.batch_size)
    return pipe(source, partial(map_items, function=partial(to_host, device=device)))


def empty_batch(recipe: Recipe[Any], config: Any, assignment: LaneAssignment, device: torch.device) -> Tree:
    """What stands for a batch of a process that has none left while others have: tensors of the host."""
    return to_host(recipe.example(config, assignment.rows(config.dataset.batch_size)), device)


def to_host(batch: Tree, device: torch.device) -> Tree:
    """A batch of arrays as tensors of the host; for CUDA in pinned memory, from which they are copied without waiting."""
    tensors = tree.from_numpy(batch)
    return tree.map(torch.Tensor.pin_memory, tensors) if device.type == "cuda" else tensors


def to_device(batch: Tree, device: torch.device) -> Tree:
    """A batch of tensors on a device, whose work behind this call sees them: the host does not wait for the copy."""
    return tree.map(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _scaling(config: Any) -> LossScaling | None:
    return LossScaling(*config.trainer.fp16_loss_scale) if config.trainer.dtype == "float16" else None


def _local_microbatches(config: Any, mesh: Mesh) -> int:
    count: int = config.gang.num_microbatches // (mesh.replica.size * mesh.shard.size)
    return count


def without_fused_update(update: Transform, level: JitMode) -> Transform:
    """The update as the level wants it: Inductor makes a kernel of the whole by itself, and reads the gradients once."""
    return attrs.evolve(update, fused_update=None) if level == "inductor" else update
