"""Adapters: matrices of low rank that are trained beside frozen weights (LoRA: Hu et al. 2021, arXiv:2106.09685; DoRA).

The base keeps its paths. Beside it, at `adapter.PATH` for the weight at PATH: `a` float32 [r, in], `b` float32 [out, r], and
for DoRA `magnitude` float32 [out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.config import AdapterSection, ModelSection
from fnrecipe.config.nested import nested
from fnrecipe.config.patterns import fits
from fnrecipe.errors import UsageError, did_you_mean
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.model import find_model
from fnrecipe.models.parameters import pattern
from fnrecipe.nn import Adapted
from fnrecipe.nn.adapted import merge
from fnrecipe.parallel.mesh import Placement, is_shard, outline, replicated, unwrapped
from fnrecipe.parallel.whole import whole
from fnrecipe.tree import Tree

ADAPTER = "adapter"
"""Where among the parameters of the model those of the adapter are."""


def init(model: ModelSection, key: Tensor, place: Placement, base: Callable[[], Tree]) -> Tree:
    """The parameters that `base` gives, and beside them those of the section's adapter, if it has one.

    a is uniform in ±1/√in, as peft begins it, and b is zeros; magnitudes are the norms of the rows of weights. So the adapted
    model begins as its base.

    Raises:
        UsageError: before `base` is called, if a target fits no weight.
    """
    if model.adapter.name is None:
        return base()
    shapes = targets(model)
    params = base()
    leaves = tree.paths(params, is_shard)

    def parts(path: str, shape: torch.Size) -> dict[str, Tree]:
        made = _low_rank(key, path, shape, model.adapter.rank)
        if model.adapter.name == "dora":
            made["magnitude"] = _row_norms(leaves[path])
        return {name: place(f"{ADAPTER}.{path}.{name}", leaf) for name, leaf in made.items()}

    return {**params, ADAPTER: nested({path: parts(path, shape) for path, shape in shapes.items()})}


def targets(model: ModelSection) -> dict[str, torch.Size]:
    """The shapes of the weights that the section's adapter is beside, by their paths: matrices of layers.

    Raises:
        UsageError: if a pattern fits none of them.
    """
    layers = _matrices(_shapes(model))
    for target in model.adapter.targets:
        if not any(fits(path, 2, [target]) for path in layers):
            near = did_you_mean(target, {pattern(path) for path in layers})
            raise UsageError(f"model.adapter.targets: expected patterns of matrices of layers, found {target!r}; {near}")
    return {path: shape for path, shape in layers.items() if fits(path, 2, model.adapter.targets)}


def flops(model: ModelSection, whole: TokenFlops) -> TokenFlops:
    """FLOPs of training the adapter, from those of training all of the model.

    A product with a frozen weight has no gradient of the weight, a third of its FLOPs; those of the adapter are added.
    """
    shapes = _shapes(model)
    head = [shapes[path] for path in ("head", "embedding") if path in shapes][:1]
    beside = model.adapter.rank * sum(map(sum, targets(model).values()))
    change = 6 * beside - 2 * sum(math.prod(shape) for shape in [*_matrices(shapes).values(), *head])
    return TokenFlops(whole.full + change, whole.causal + change)


def adapted(section: AdapterSection, params: Tree, key: Tensor | None = None) -> Tree:
    """The parameters with `nn.Adapted` weights where there is an adapter beside them; as they are where there is none.

    What is dropped out, with a `key` alone, comes from it and the weight's number among the adapted ones, in order of paths.
    """
    if ADAPTER not in params:
        return params
    adapter = params[ADAPTER] if key is None or not section.dropout else _with_keys(params[ADAPTER], key)
    base = {name: value for name, value in params.items() if name != ADAPTER}

    def beside(weight: Tree, parts: Mapping[str, Tree]) -> Adapted:
        magnitude, drop = parts.get("magnitude", ()), parts.get("key", ())
        return Adapted(weight, parts["a"], parts["b"], magnitude, drop, section.scale, section.dropout)

    return _with(base, adapter, beside)


def merged(section: AdapterSection, params: Tree) -> Tree:
    """The parameters with the adapter added to its weights, in float32, and rounded to their dtype once.

    Shards must be whole tensors.
    """
    if ADAPTER not in params:
        return params

    def add(weight: Tree, parts: Mapping[str, Tree]) -> Tree:
        a, b, *magnitude = (unwrapped(parts[name])[0] for name in ("a", "b", "magnitude") if name in parts)
        found = merge(unwrapped(weight)[0], a, b, section.scale)
        for each in magnitude:
            found = found * (each / torch.linalg.vector_norm(found, dim=1))[:, None]
        return tree.map(lambda leaf: found.to(leaf.dtype), weight)

    return _with({name: value for name, value in params.items() if name != ADAPTER}, params[ADAPTER], add)


def rules(cuts: Mapping[str, int]) -> dict[str, int]:
    """How tensor parallelism cuts adapters of weights that it cuts by `cuts`: b and magnitudes by rows, or a by columns."""
    rows = {f"{ADAPTER}.{path}.{name}": 0 for path, dim in cuts.items() if dim == 0 for name in ("b", "magnitude")}
    return rows | {f"{ADAPTER}.{path}.a": 1 for path, dim in cuts.items() if dim == 1}


def _shapes(model: ModelSection) -> dict[str, torch.Size]:
    """The shapes of the parameters of the section's model, by their paths."""
    base = find_model(model.family).init(model.config, torch.empty(2, dtype=torch.int64, device="meta"), replicated)
    return {path: leaf.shape for path, leaf in tree.paths(base).items()}


def _matrices(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Those of layers."""
    return {path: shape for path, shape in shapes.items() if path.startswith("layers.") and len(shape) == 2}


def _with_keys(adapter: Tree, key: Tensor) -> Tree:
    """The adapter with a key of its own beside the matrices of each weight: all of them folded at once."""
    leaves = tree.paths(adapter, is_shard)
    weights = sorted({path.rpartition(".")[0] for path in leaves})
    keys = random.fold_in(random.fold_in(key, ADAPTER), torch.arange(len(weights), device=key.device))
    return nested(leaves | {f"{path}.key": each for path, each in zip(weights, keys.unbind(), strict=True)})


def _low_rank(key: Tensor, path: str, shape: torch.Size, rank: int) -> dict[str, Tensor]:
    out, width = shape
    drawn = random.uniform(random.fold_in(key, f"{ADAPTER}.{path}.a"), rank, width)
    return {"a": (2 * drawn - 1) / math.sqrt(width), "b": torch.zeros(out, rank, device=key.device)}


def _row_norms(weight: Tree) -> Tensor:
    """The norms of the rows of a whole weight: of its shape alone, where it is on the device meta."""
    local: Tensor = unwrapped(weight)[0]
    if local.is_meta:  # so is a fake tensor, of a trace by shapes alone
        return local.new_empty(outline(weight).shape[0], dtype=torch.float32)
    rows: Tensor = torch.linalg.vector_norm(whole(weight).float(), dim=1)
    return rows


def _with(base: Tree, adapter: Tree, make: Callable[[Tree, Mapping[str, Tree]], Tree]) -> Tree:
    """`base` with `make(weight, its adapter)` in the place of the weights that have one."""
    if not isinstance(base, Mapping):
        return make(base, adapter)
    return {name: _with(child, adapter[name], make) if name in adapter else child for name, child in base.items()}
