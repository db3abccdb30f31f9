"""The sizes of activations of models that differ in width or depth alone, over their first steps: a coordinate check.

(Yang et al. 2022, arXiv:2203.03466, appendix D.1.) Where rates transfer, what steps change has the same size in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.build import batches, init_train_state, make_step, to_device
from fnrecipe.config import LRSchedulerSection, ModelSection
from fnrecipe.config.structure import structure
from fnrecipe.data import Batch, map_items, pipe, reading
from fnrecipe.errors import UsageError
from fnrecipe.models.model import find_model
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import lane_assignment, make_mesh
from fnrecipe.tree import Tree

Along: TypeAlias = Literal["width", "depth"]

QUANTITIES = ("stream", "logits", "change of stream", "change of logits")
"""The residual stream behind the last layer; logits; and how far both are from where they were before the first step."""


@attrs.frozen
class Coordinates:
    """Means of |x| in a model of this width or depth: by quantity, those before the first step and behind each step."""

    size: int
    means: dict[str, tuple[float, ...]]


def coordinates(recipe: Recipe[C], config: C, along: Along, sizes: Sequence[int], steps: int) -> list[Coordinates]:
    """Trains a model of each size for `steps` steps at the peak rate, and measures it each time on the first batch.

    Raises:
        UsageError: if the recipe trains no decoder on packed rows, a model of such a size cannot be, the data does not last, or
            a mean is 0 or not finite.
    """
    changed = [resized(recipe, config, along, size) for size in sizes]
    device = host.pick_device(config.gang.device)
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    rows = _batches(recipe, config, mesh, device, steps)
    found = [Coordinates(size, _means(recipe, each, mesh, rows)) for size, each in zip(sizes, changed, strict=True)]
    for each in found:
        for name, (_, *later) in each.means.items():
            if wrong := [mean for mean in later if not 0 < mean < math.inf]:
                where = f"{name} of the model of {along} {each.size}"
                raise UsageError(f"optimizer: expected steps behind which the {where} is finite and not 0, found {wrong[0]}")
    return found


def slope(found: Sequence[Coordinates], quantity: str) -> float:
    """That of the least-squares line through log mean behind the last step over log size: 0 where sizes do not matter."""
    xs, ys = [math.log(each.size) for each in found], [math.log(each.means[quantity][-1]) for each in found]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def resized(recipe: Recipe[C], config: C, along: Along, size: int) -> C:
    """The config with a model of another width, in heads of the same width, or depth; at the peak rate from the first step on.

    Raises:
        UsageError: if the recipe has no such sections, or the number of heads would be no integer.
    """
    model, scheduler = getattr(config, "model", None), getattr(config, "lr_scheduler", None)
    if not isinstance(model, ModelSection) or not isinstance(scheduler, LRSchedulerSection):
        raise UsageError(f"{recipe.name}: expected a recipe with the sections model and lr_scheduler, as lm has them")
    shape = {field.name: getattr(model.config, field.name) for field in attrs.fields(type(model.config))}
    if along == "depth":
        new = {"num_layers": size}
    else:
        new = {name: _times(name, shape[name], size, shape["model_dim"]) for name in WIDTHS if name in shape}
    changed = attrs.evolve(model, config=attrs.evolve(model.config, **new))  # type: ignore[misc]
    return attrs.evolve(config, model=changed, lr_scheduler=structure({"name": "constant"}, scheduler))  # type: ignore[misc]


WIDTHS = ("model_dim", "num_attn_heads", "num_key_value_heads", "ffn_inner_dim")
"""What grows with the width."""


def _times(name: str, value: int, size: int, width: int) -> int:
    found, rest = divmod(value * size, width)
    if rest or not found:
        expected = f"widths at which model.config.{name} = {value} at {width} is an integer"
        raise UsageError(f"--widths: expected {expected}, found {size}")
    return found


def _batches(recipe: Recipe[C], config: C, mesh: Mesh, device: torch.device, steps: int) -> list[Batch]:
    read = batches(recipe, config, lane_assignment(mesh, config.gang.num_microbatches), device)
    read = pipe(read, partial(map_items, function=partial(to_device, device=device)))
    with reading(read(None)) as stream:
        found = [batch for batch, _ in islice(stream, steps)]
    if not all(isinstance(batch, Batch) for batch in found):
        raise UsageError(f"{recipe.name}: expected a recipe whose batches are rows of text, as those of lm are")
    if len(found) < steps:
        raise UsageError("dataset: expected a batch for each step of the check, found fewer; take less --steps or more data")
    return found


def _means(recipe: Recipe[C], config: C, mesh: Mesh, found: Sequence[Batch]) -> dict[str, tuple[float, ...]]:
    """Those of a model that is trained on the batches."""
    device = found[0].tokens.device
    step, state = make_step(recipe, config, mesh, device), init_train_state(recipe, config, mesh, device)
    measured = [_activations(recipe, config, state.params, found[0])]
    for batch in found:
        state, _ = step(state, batch)
        measured.append(_activations(recipe, config, state.params, found[0]))
    means = {}
    for name, values in zip(("stream", "logits"), zip(*measured, strict=True), strict=True):
        means[name] = tuple(value.abs().mean().item() for value in values)
        means[f"change of {name}"] = tuple((value - values[0]).abs().mean().item() for value in values)
    return means


def _activations(recipe: Recipe[C], config: C, params: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """The residual stream behind the last layer, and logits."""
    section: ModelSection = config.model  # type: ignore[attr-defined]
    model, mine = find_model(section.family), recipe.model(config, params)
    if model.stream is None:
        raise UsageError(f"model.family: expected one whose Model has a stream, found {section.family}")
    args = (section.config, mine, batch.tokens, batch.segments, batch.positions)
    stream, logits = (apply(*args, policy=Policy(), scope="document") for apply in (model.stream, model.apply))
    return nn.all_logits(stream), nn.all_logits(logits)
