"""Updates of each tensor by itself, dealt over ranks: each rank computes those of the tensors that it owns.

A rank owns the state of its tensors, too: that is `fnrecipe.parallel.mesh.Dealt`, and never travels. Gradients and parameters
go to their owners, updates come back. Each rank has what a state has for all tensors together, such as a counter, and what is
0-d.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fnrecipe import tree
from fnrecipe.ops import fence
from fnrecipe.parallel.deal import Deal, Key, Kind, at_owners, deal
from fnrecipe.parallel.mesh import Dealt, is_shard, outline
from fnrecipe.tree import Tree

Report: TypeAlias = dict[str, Tensor]
Init: TypeAlias = Callable[[Tree], Tree]
Update: TypeAlias = Callable[[Tree, Tree, Tree, Tensor], tuple[Tree, Tree, Report]]


@attrs.frozen(eq=False)
class _Plan:
    """Who computes what.

    deal       the owner of each parameter
    outlines   each whole parameter, by path, without its numbers
    leaves     each leaf of the whole state, by path, without its numbers
    of_params  for each leaf of the state the parameters whose states have it, in order
    structure  that of the whole state
    """

    deal: Deal
    outlines: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]
    of_params: Mapping[str, Sequence[str]]
    structure: pytree.TreeSpec

    def shared(self) -> dict[str, str]:
        """The leaves that each rank has, for several parameters or 0-d, and the parameter whose owner computes each of them."""
        return {name: paths[0] for name, paths in self.of_params.items() if len(paths) > 1 or not self.leaves[name].ndim}

    def owned(self) -> list[str]:
        return [path for path in self.outlines if self.deal.owns(path)]


def init_dealt(init: Init, params: Tree) -> Tree:
    """What `init` gives for whole parameters, as far as this rank has it."""
    plan = _plan(init, params)
    found: dict[str, Tensor] = {}

    def compute(whole: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        if mine := plan.owned():
            found.update(tree.paths(init({path: whole["parameter", path] for path in mine})))
        return {("state", name): found[name] for name, path in plan.shared().items() if path in mine}

    shared = _everywhere(plan, {"parameter": params}, {}, compute)
    device = tree.leaves(params)[0].device

    def held(name: str, leaf: Tensor) -> Tensor | Dealt:
        if ("state", name) in shared:
            return shared["state", name]
        if name in found:
            return Dealt(found[name], leaf.shape, held=True)
        return Dealt(torch.empty((0,) * leaf.ndim, dtype=leaf.dtype, device=device), leaf.shape, held=False)

    return pytree.tree_unflatten([held(*pair) for pair in plan.leaves.items()], plan.structure)


def update_dealt(
    init: Init, update: Update, gradients: Tree, state: Tree, params: Tree, step: Tensor
) -> tuple[Tree, Tree, Report]:
    """`update`, whose `init` this is, of whole tensors, each of them on one rank."""
    fence()
    plan, local = _plan(init, params), _locals(state)
    found: dict[str, Tensor] = {}

    def compute(whole: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        mine = plan.owned()
        if not mine:
            return {}
        with _disable_current_modes():
            form = init({path: plan.outlines[path] for path in mine})
        before = tree.like(form, [local[name] for name in tree.paths(form)])
        given = ({path: whole[what, path] for path in mine} for what in ("gradient", "parameter"))
        updates, after, _ = update(next(given), before, next(given), step)
        found.update(tree.paths(after))
        shared = {("state", name): found[name] for name, path in plan.shared().items() if path in mine}
        return {("update", path): leaf for path, leaf in tree.paths(updates).items()} | shared

    kinds = {("update", path): (leaf.shape, leaf.dtype) for path, leaf in _locals(gradients).items()}
    results = _everywhere(plan, {"gradient": gradients, "parameter": params}, kinds, compute)

    def after(name: str, leaf: Tensor | Dealt) -> Tensor | Dealt:
        if isinstance(leaf, Dealt):
            return attrs.evolve(leaf, local=found[name]) if leaf.held else leaf
        return results["state", name]

    leaves, structure = pytree.tree_flatten(state, is_shard)
    new = [after(name, leaf) for name, leaf in zip(tree.paths(state, is_shard), leaves, strict=True)]
    updates = tree.like(gradients, [results["update", path] for path in tree.paths(gradients, is_shard)])
    return updates, pytree.tree_unflatten(new, structure), {}


def _plan(init: Init, params: Tree) -> _Plan:
    outlines = {path: outline(leaf) for path, leaf in tree.paths(params, is_shard).items()}
    with _disable_current_modes():  # it is no part of a trace
        whole = init(pytree.tree_map(outline, params, is_leaf=is_shard))
        of_params = defaultdict[str, list[str]](list)
        for path, leaf in outlines.items():
            for name in tree.paths(init({path: leaf})):
                of_params[name].append(path)
    return _Plan(deal(params), outlines, tree.paths(whole), of_params, pytree.tree_structure(whole))


def _everywhere(
    plan: _Plan,
    given: Mapping[str, Tree],
    kinds: Mapping[Key, Kind],
    compute: Callable[[Mapping[Key, Tensor]], Mapping[Key, Tensor]],
) -> Mapping[Key, Tensor]:
    """This rank's parts of what `compute` makes, for the parameters that this rank owns, of the trees in `given`."""
    parts = {(what, path): leaf for what, values in given.items() for path, leaf in _locals(values).items()}
    routes = {key: plan.deal.routes[key[1]] for key in (*parts, *kinds)}
    for name, path in plan.shared().items():
        leaf = plan.leaves[name]
        kinds = {**kinds, ("state", name): (leaf.shape, leaf.dtype)}
        routes["state", name] = plan.deal.whole(path)
    return at_owners(parts, kinds, routes, plan.deal.axes, compute, next(iter(parts.values())).device)


def _locals(values: Tree) -> dict[str, Tensor]:
    """The tensors that this rank has, contiguous, by path."""
    return {path: leaf.contiguous() for path, leaf in tree.paths(values).items()}
