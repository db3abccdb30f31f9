"""A run as values again: the recipe that was trained, its config and its parameters, in one process on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import attrs
import torch

from fnrecipe import checkpoint, optim, random, tree
from fnrecipe.build import trained
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.checkpoint.tensors import Saved
from fnrecipe.config import resolve
from fnrecipe.config.model_dir import is_hugging_face
from fnrecipe.errors import CheckpointError, UsageError
from fnrecipe.optim.partition import chosen, merged, subset
from fnrecipe.optim.stochastic_rounding import wide
from fnrecipe.parallel.mesh import Placement, replicated
from fnrecipe.recipe import C, Recipe
from fnrecipe.shell.directory import layout
from fnrecipe.shell.directory.recorded_recipe import instead, recorded_recipe
from fnrecipe.shell.find_recipe import Named, recipe_of
from fnrecipe.tree import Tree

_PARAMS, _OPTIMIZER, _MEAN = "params", "optimizer", "average.mean"

Weights: TypeAlias = Literal["latest", "average"]
"""Which parameters of a checkpoint are meant: those of its step, as the optimizer shows them, or their average."""


class LoadedRun(NamedTuple):
    """The recipe and the config of a run, and the parameters of a checkpoint: whole tensors on the CPU."""

    recipe: Recipe[Any]
    config: Any
    params: Tree


def load(run: str | Path, recipe: Named | None = None, *, step: int | None = None, weights: Weights = "latest") -> LoadedRun:
    """The run in the output directory `run`, whatever number of processes trained it and however they cut its state.

    The parameters are those of its newest whole checkpoint, or of the one of `step`, as the optimizer shows them
    (`Transform.shown`); with weights="average", their average (`trainer.average`), in their dtype.

    The recipe is found by its name in `run.json`, and its code runs, as it does to train it. Where it is somewhere else by now,
    or for a run of somebody whom you do not trust, give the `recipe`, or a name by which `fnrecipe train` finds one.

    Raises:
        UsageError: if that is no run, its recipe is not found or another one, or its config does not fit the recipe.
        CheckpointError: if there is no checkpoint that is whole, or its parameters are not those of the config.
    """
    out = Path(run)
    found = recorded_recipe(out) if recipe is None else recipe_of(recipe)
    if not (out / layout.CONFIG).exists():
        raise UsageError(f"{out}: expected the output directory of a run, found {instead(out, layout.CONFIG)}")
    config, _ = resolve(found.config, [out / layout.CONFIG])
    params = read_params(found, config, checkpoint.of_run(out, step), torch.device("cpu"), replicated, weights)
    return LoadedRun(found, config, params)


def is_model_dir(path: str, weights: Weights, step: int | None = None) -> bool:
    """Whether the directory `path` is one of Hugging Face, not of a run, which alone has weights and steps to choose from.

    Raises:
        UsageError: if it is, and another choice is made than the latest weights.
    """
    found = is_hugging_face(path)
    for option, given in (("--weights", weights != "latest"), ("--step", step is not None)):
        if found and given:
            raise UsageError(f"{option}: expected the directory of a run, found one of Hugging Face: {path}")
    return found


def read_params(
    recipe: Recipe[C],
    config: C,
    found: Checkpoint,
    device: torch.device,
    place: Placement,
    weights: Weights = "latest",
) -> Tree:
    """The parameters in a checkpoint, as `place(path, leaf)` leaves them, on a device; with "average", that of those trained.

    Raises:
        CheckpointError: if they are not those of the config, or cannot be read; if there is no average.
    """
    # No number is drawn: on the device meta, `init` says no more than what the parameters are like.
    outline = recipe.init(config, random.key(config.common.seed, torch.device("meta")), place)
    like = {_PARAMS: tree.map(lambda leaf: torch.empty_like(leaf, device=device), outline)}
    params: Tree = _restored(found, _PARAMS, like)[_PARAMS]
    if weights == "latest":
        return _shown(recipe, config, found, params, outline)
    names = {path.removeprefix(f"{_MEAN}.") for path in _below(found, _MEAN)}
    if not names:
        raise CheckpointError(f"{found.directory}: expected an average of the parameters (trainer.average), found none")
    latest = subset(params, names)
    mean = tree.map(lambda leaf: torch.empty_like(wide(leaf)), latest)
    average = _restored(found, _MEAN, {"average": {"mean": mean}})["average"]["mean"]
    return merged(params, tree.map(lambda leaf, like: leaf.to(like.dtype), average, latest))


def _shown(recipe: Recipe[C], config: C, found: Checkpoint, params: Tree, outline: Tree) -> Tree:
    """The parameters as the optimizer shows them, whose state is read where it shows others than it trains."""
    update = recipe.update(config)
    if update.shown is None or not found.step:
        return params
    paths = chosen(params, trained(recipe, config))
    outlined = optim.init_parts(update, subset(outline, paths))
    like = tree.map(lambda leaf: torch.empty_like(leaf, device=tree.leaves(params)[0].device), outlined)
    state = _restored(found, _OPTIMIZER, {_OPTIMIZER: like})[_OPTIMIZER]
    return merged(params, update.shown(state, subset(params, paths)))


def _restored(found: Checkpoint, prefix: str, like: Tree) -> Tree:
    return checkpoint.restore(attrs.evolve(found, tensors=_below(found, prefix)), like)


def _below(found: Checkpoint, prefix: str) -> dict[str, Saved]:
    return {path: saved for path, saved in found.tensors.items() if path.startswith(f"{prefix}.")}
