"""From a recipe, its config and a mesh to what is folded: the state, the functions and the batches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import attrs
import torch

from fnrecipe import random, tree
from fnrecipe.compiler import Backend, cuda_graph
from fnrecipe.compiler.modes import BACKENDS, JitMode, jit_mode
from fnrecipe.compiler.products import Choose, by_rule
from fnrecipe.compiler.pure import without_draws
from fnrecipe.compiler.torch_versions import inductor_takes_gathers
from fnrecipe.config import ShellConfig
from fnrecipe.config.patterns import fits
from fnrecipe.contract import check_batch_size, check_params, checked_loss
from fnrecipe.data import LaneAssignment, Source, checked, in_worker_processes, map_items, pipe, prefetch
from fnrecipe.errors import UsageError, did_you_mean
from fnrecipe.loss import Sums
from fnrecipe.optim import Transform
from fnrecipe.optim.average import Averaging
from fnrecipe.optim.fused_adamw import has_triton
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.partition import Mask, chosen
from fnrecipe.optim.spikes import SpikeGuard
from fnrecipe.parallel.mesh import Mesh, replicated
from fnrecipe.recipe import C, Evaluation, Recipe
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import evaluation as evaluate
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree


def init_train_state(recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device, *, pretrained: bool = False) -> State:
    """The state before the first step; with `pretrained`, the parameters are read where the config names files of them."""
    _check_trains(recipe, config)
    key = random.key(config.common.seed, device)
    init_key = random.fold_in(key, "init")
    read = recipe.pretrained(config, init_key, mesh.cut) if pretrained and recipe.pretrained else None
    params = recipe.init(config, init_key, mesh.cut) if read is None else read
    check_params(recipe.name, params)
    also = _scaling(config), trained(recipe, config), _averaging(config), _guard(config)
    return init_state(params, recipe.update(config), key, *also)


def trained(recipe: Recipe[C], config: C) -> Mask:
    """What the recipe trains, and the patterns of the config leave."""
    patterns = config.trainer.trains
    of_recipe = partial(recipe.trains, config)
    if patterns is None:
        return of_recipe
    return lambda path, parameter: fits(path, parameter.ndim, patterns) and of_recipe(path, parameter)


def _check_trains(recipe: Recipe[C], config: C) -> None:
    """Before anything is read or drawn: whether each pattern of the config fits a parameter that the recipe trains."""
    patterns = config.trainer.trains
    if patterns is None:
        return
    outline = recipe.init(config, random.key(config.common.seed, torch.device("meta")), replicated)
    paths = chosen(outline, partial(recipe.trains, config))
    dims = {path: leaf.ndim for path, leaf in tree.paths(outline).items() if path in paths}
    for each in patterns:
        if not any(fits(path, dims[path], [each]) for path in paths):
            near = did_you_mean(each, {re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths})
            expected = f"patterns of parameters that the recipe {recipe.name} trains"
            raise UsageError(f"trainer.trains: expected {expected}, found {each!r}; {near}")


def plain_step(recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device) -> Step:
    """The train step over a mesh, as it is before it is traced for a device."""
    update = for_mode(recipe.update(config), jit_mode(config.trainer.jit, device), device)
    check_batch_size(recipe.name, config.dataset.batch_size, config.gang.num_microbatches)
    loss = checked_loss(recipe.name, recipe.loss(config))
    share = _local_microbatches(config, mesh)
    also = _scaling(config), trained(recipe, config), _averaging(config), _guard(config)
    return train_step(loss, update, share, mesh, *also)


def make_step(
    recipe: Recipe[C],
    config: C,
    mesh: Mesh,
    device: torch.device,
    with_progress: Callable[[Backend], Backend] = lambda b: b,
    choose: Choose = by_rule,
) -> Step:
    """The train step of a recipe over a mesh, as `trainer.jit` says; `with_progress` may wrap what runs its graph.

    `choose` says what computes its large matrix products on a CPU.

    Raises:
        UsageError: for a CUDA graph on another device, or of several ranks, whose collectives have not been captured, or
            (when it is traced) of a step that reads a number on the host; for all-gathers where torch cannot compile them.
    """
    captured = _captured(config, mesh, device)
    step, mode = plain_step(recipe, config, mesh, device), _checked_mode(config, mesh, device)
    if mode == "off":
        return without_draws(step)
    backend = with_progress(partial(BACKENDS[mode], choose=choose))
    required = config.trainer.cuda_graph is True
    return jit(step, donate=1, backend=cuda_graph(backend, required=required) if captured else backend)


def make_evaluation(
    recipe: Recipe[C],
    evaluation: Evaluation[C],
    config: C,
    mesh: Mesh,
    device: torch.device,
    with_progress: Callable[[Backend], Backend] = lambda b: b,
    choose: Choose = by_rule,
    *,
    compiled: bool = True,
) -> Callable[[Tree, Tree], Sums]:
    """`(params, batch) -> sums` of an evaluation over a mesh, run as the train step is, on parameters of its state.

    Without `compiled`, it is traced where the train step is compiled: compiling takes longer than a few batches save.
    """
    loss = evaluation.loss(config) if evaluation.loss else recipe.loss(config)
    sums = evaluate(checked_loss(recipe.name, loss), _local_microbatches(config, mesh), mesh)
    mode = _checked_mode(config, mesh, device)
    if mode == "off":
        return without_draws(sums)
    backend = with_progress(partial(BACKENDS[mode if compiled else "trace"], choose=choose))
    return jit(sums, fixed=1, backend=cuda_graph(backend) if _captured(config, mesh, device) else backend)


def batches(recipe: Recipe[C], config: C, assignment: LaneAssignment, device: torch.device) -> Source[Tree]:
    """The training batches as tensors of the host, read ahead in processes or a thread as the config says."""
    dataset, on_host = config.dataset, partial(map_items, function=partial(to_host, device=device))
    make = partial(checked, partial(recipe.stream, config), name=f"{recipe.name}.stream", batch_size=dataset.batch_size)
    if not dataset.num_workers:
        return pipe(make(assignment), on_host, partial(prefetch, size=dataset.prefetch))
    padding = recipe.example(config, assignment.split(dataset.num_workers)[0].rows(dataset.batch_size))
    ahead = partial(in_worker_processes, make, assignment=assignment, padding=padding)
    return pipe(partial(ahead, workers=dataset.num_workers, size=dataset.prefetch), on_host)


def evaluation_batches(
    recipe: Recipe[C], name: str, evaluation: Evaluation[C], config: C, assignment: LaneAssignment, device: torch.device
) -> Source[Tree]:
    """The batches of the evaluation `name` as tensors of the host."""
    make, full_name = partial(evaluation.stream, config), f"{recipe.name}.evaluations[{name!r}]"
    source = checked(make, assignment, name=full_name, batch_size=config.dataset.batch_size)
    return pipe(source, partial(map_items, function=partial(to_host, device=device)))


def empty_batch(recipe: Recipe[C], config: C, assignment: LaneAssignment, device: torch.device) -> Tree:
    """What stands for a batch of a process that has none left while others have: tensors of the host."""
    return to_host(recipe.example(config, assignment.rows(config.dataset.batch_size)), device)


def to_host(batch: Tree, device: torch.device) -> Tree:
    """A batch of arrays as tensors of the host; for CUDA in pinned memory, from which they are copied without waiting."""
    tensors = tree.from_numpy(batch)
    return tree.map(torch.Tensor.pin_memory, tensors) if device.type == "cuda" else tensors


def to_device(batch: Tree, device: torch.device) -> Tree:
    """A batch of tensors on a device, whose work behind this call sees them: the host does not wait for the copy."""
    return tree.map(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _captured(config: ShellConfig, mesh: Mesh, device: torch.device) -> bool:
    """Whether graphs are captured as CUDA graphs: where there is one GPU, unless the config says no."""
    wanted, possible = config.trainer.cuda_graph, device.type == "cuda" and mesh.ranks == 1
    if wanted is True and not possible:
        where = f"several ranks ({mesh.ranks})" if mesh.ranks > 1 else f"the device {device.type}"
        raise UsageError(f"trainer.cuda_graph: expected auto or false for {where}, found true")
    return possible and wanted is not False


def _scaling(config: ShellConfig) -> LossScaling | None:
    return LossScaling(*config.trainer.fp16_loss_scale) if config.trainer.dtype == "float16" else None


def _averaging(config: ShellConfig) -> Averaging | None:
    section = config.trainer.average
    return Averaging(section.decay, section.start, section.every) if section else None


def _guard(config: ShellConfig) -> SpikeGuard | None:
    section = config.regime.spikes
    return None if config.regime.on_spike == "ignore" else SpikeGuard(section.window, section.bound)


def _checked_mode(config: ShellConfig, mesh: Mesh, device: torch.device) -> JitMode:
    mode = jit_mode(config.trainer.jit, device)
    if mode == "inductor" and mesh.gathers and not inductor_takes_gathers():
        expected = f"trace or off for several ranks ({mesh.ranks}) under torch {torch.__version__}"
        raise UsageError(f"trainer.jit: expected {expected}, found {config.trainer.jit}; torch 2.13 compiles their all-gathers")
    return mode


def _local_microbatches(config: ShellConfig, mesh: Mesh) -> int:
    count: int = config.gang.num_microbatches // (mesh.replica.size * mesh.shard.size)
    return count


def for_mode(update: Transform, mode: JitMode, device: torch.device) -> Transform:
    """The update as the mode wants it: Inductor would run torch's fused kernel on copies, and makes its own of the chain."""
    return attrs.evolve(update, fused_update=None) if mode == "inductor" and not has_triton(device) else update
