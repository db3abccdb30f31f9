"""Sharding as a transform of the gradient: what is whole when, of parameters that are cut over the ranks of an axis.

The state is always in parts. `replicate` has one rank on the axis. The others cut parameters and optimizer state, and differ in
when parameters are gathered and gradients summed:

    zero1   gathered before the leaves, summed and cut after them
    zero2   gathered before the leaves, summed and cut within the backward pass of each
    fsdp    gathered by each layer of each leaf, again in its backward pass, and summed and cut there

(ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; stages 1, 2 and 3.) All take the same sums in the same order, because a rank's
leaves are chosen for it (`fnrecipe.data.Place`): what is summed over ranks first are neighbours in the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad

from fnrecipe import tree
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim import stochastic_rounding
from fnrecipe.optim.loss_scale import scaled
from fnrecipe.parallel.collectives import scatter_sum, tree_sum
from fnrecipe.parallel.mesh import Mesh, Part
from fnrecipe.transforms.accumulate import accumulate
from fnrecipe.transforms.region import region
from fnrecipe.transforms.unshard import lent, on_shard_axis, whole
from fnrecipe.tree import Tree


def gradients(loss: Loss, num_leaves: int = 1, mesh: Mesh = Mesh()) -> Callable[[Tree, Any, Any], tuple[Tree, Sums]]:
    """`(params, batch, scale) -> (gradient, sums)` over the leaves of all ranks, `num_leaves` of each.

    The gradient is that of the loss times `scale` (`fnrecipe.optim.loss_scale`), cut like `params`, in float32 at least. `loss`
    gets whole parameters; only under `fsdp` does it get parts, and leaves it to `layer` and `whole` to gather them.
    """
    of_leaf, add = _of_leaf(num_leaves, mesh), _into_copy if mesh.ranks == 1 else torch.add

    def slope(given: tuple[Tree, Any], batch: Any) -> tuple[Tree, Sums]:
        params, scale = given
        found: tuple[Tree, Sums] = grad(scaled(loss, scale), has_aux=True)(_wide(params), batch)
        return found

    def after_leaves(params: Tree, batch: Any, scale: Any) -> tuple[Tree, Sums]:
        gradient, sums = accumulate(of_leaf(slope), num_leaves, add)((whole(params), scale), batch)
        return _cut_sum(gradient, params), tree_sum(sums, mesh.shard)

    def in_leaves(loss: Loss, params: Tree, batch: Any) -> tuple[Tree, Sums]:
        def leaf(params: Tree, batch: Any) -> tuple[Tree, Sums]:
            gradient, sums = grad(loss, has_aux=True)(params, batch)
            return gradient, tree_sum(sums, mesh.shard)

        found: tuple[Tree, Sums] = accumulate(leaf, num_leaves)(params, batch)
        return found

    def of_replica(params: Tree, batch: Any, scale: Any) -> tuple[Tree, Sums]:
        times = scaled(loss, scale)
        match mesh.sharding:
            case "fsdp":
                return in_leaves(times, _wide(params), batch)
            case "zero2":
                wide = _wide(params)
                gathered = whole(wide)
                return in_leaves(lambda params, batch: times(lent(gathered, params), batch), wide, batch)
            case _:
                return after_leaves(params, batch, scale)

    def of_all(params: Tree, batch: Any, scale: Any = ()) -> tuple[Tree, Sums]:
        gradient, sums = tree_sum(of_replica(params, batch, scale), mesh.replica)
        return tree.like(params, tree.leaves(gradient)), sums

    return of_all


def evaluation(loss: Loss, num_leaves: int = 1, mesh: Mesh = Mesh()) -> Callable[[Tree, Any], Sums]:
    """`(params, batch) -> sums` over the leaves of all ranks, without gradients."""

    of_leaf = _of_leaf(num_leaves, mesh)

    def leaf(params: Tree, batch: Any) -> Sums:
        sums = loss(params, batch)[1]
        return tree_sum(sums, mesh.shard) if mesh.in_turns else sums

    def of_replica(params: Tree, batch: Any) -> Sums:
        given = params if mesh.sharding == "fsdp" else whole(params)
        sums: Sums = accumulate(of_leaf(leaf), num_leaves)(given, batch)
        return sums if mesh.in_turns else dict(tree_sum(sums, mesh.shard))

    return lambda params, batch: tree_sum(of_replica(params, batch), mesh.replica)


def _of_leaf(num_leaves: int, mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How functions of a leaf are traced: as a region if there are several leaves, but not among ranks, where they overlap."""
    return partial(region, name="leaf") if mesh.ranks == 1 and num_leaves > 1 else lambda function: function


def _into_copy(left: Tensor, right: Tensor) -> Tensor:
    """Their sum. `jit` drops the copy, since nobody reads `left` any more, and adds into `left` itself."""
    return left.clone().add_(right)


def _cut_sum(values: Tree, params: Tree) -> Tree:
    """The sums over the ranks of whole `values`, cut like `params`."""
    parts = [leaf for leaf in tree.leaves(params, on_shard_axis) if on_shard_axis(leaf)]
    if not parts:
        return values
    sums = scatter_sum(tree.leaves(values), [part.dim for part in parts], parts[0].axis)
    return tree.like(params, sums)


def _wide(params: Tree) -> Tree:
    """Parameters whose gradients are float32 at least; what is widened for that still travels as it was."""

    def wide(leaf: Any) -> Any:
        if not on_shard_axis(leaf):
            return stochastic_rounding.wide(leaf)
        local = stochastic_rounding.wide(leaf.local)
        return leaf if local is leaf.local else Part(local, leaf.dim, attrs.evolve(leaf.axis, gathered=leaf.local.dtype))

    return pytree.tree_map(wide, params, is_leaf=on_shard_axis)
