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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad

from fnrecipe import rounding, tree
from fnrecipe.collectives import Linear, buckets, gather, scatter_sum, tree_sum, with_transpose
from fnrecipe.loss import Loss, Sums
from fnrecipe.loss_scale import scaled
from fnrecipe.parts import Mesh, Part
from fnrecipe.transforms.accumulate import accumulate
from fnrecipe.transforms.region import region
from fnrecipe.transforms.remat import remat
from fnrecipe.tree import Tree


def gradients(loss: Loss, num_leaves: int = 1, mesh: Mesh = Mesh()) -> Callable[[Tree, Any, Any], tuple[Tree, Sums]]:
    """`(params, batch, scale) -> (gradient, sums)` over the leaves of all ranks, `num_leaves` of each.

    The gradient is that of the loss times `scale` (`fnrecipe.loss_scale`), cut like `params`, in float32 at least. `loss` gets
    whole parameters; only under `fsdp` does it get parts, and leaves it to `layer` and `whole` to gather them.
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
                return in_leaves(lambda params, batch: times(_lent(gathered, params), batch), wide, batch)
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


def layer(function: Callable[..., Any], *, again: bool = False) -> Callable[..., Any]:
    """`function(params, …)` of parts: gathered when it runs and again when its gradient is taken, and never kept in between.

    Its values are computed again then too, whether or not there is anything to gather if `again` says so.
    """
    recomputed = remat(lambda params, *args: function(whole(params), *args))
    return lambda params, *args: recomputed(params, *args) if again or _is_spread(params) else function(whole(params), *args)


def whole(values: Tree) -> Tree:
    """`values` with every part of the shard axis gathered. The transpose of gathering is to sum over the ranks, and to cut."""
    leaves, spec = pytree.tree_flatten(values, _is_shard)
    parts = [leaf for leaf in leaves if _is_shard(leaf)]
    if not parts:
        return values
    gathered = iter(_with_sum(lambda locals: _gathered(locals, parts), parts))
    return pytree.tree_unflatten([next(gathered) if _is_shard(leaf) else leaf for leaf in leaves], spec)


def _lent(gathered: Tree, params: Tree) -> Tree:
    """`gathered`, as if it were gathered now from `params`, in buckets: each is summed as soon as its gradients are there."""
    wholes, parts = tree.leaves(gathered), tree.leaves(params, _is_shard)

    def lend(bucket: Sequence[int]) -> Sequence[Tensor]:
        return _with_sum(lambda locals: [wholes[number] for number in bucket], [parts[number] for number in bucket])

    lent = {number: whole for bucket in buckets(wholes) for number, whole in zip(bucket, lend(bucket), strict=True)}
    return tree.like(gathered, [lent[number] for number in range(len(wholes))])


def _with_sum(function: Linear, parts: Sequence[Part]) -> Sequence[Tensor]:
    """The whole tensors that `function` makes of the parts; their gradients are summed over the ranks, and cut."""
    dims, axis = [part.dim for part in parts], parts[0].axis
    if axis.size == 1 and all(part.axis.gathered is None for part in parts):
        return [part.local for part in parts]
    return with_transpose(function, lambda wholes: scatter_sum(wholes, dims, axis))([part.local for part in parts])


def _cut_sum(values: Tree, params: Tree) -> Tree:
    """The sums over the ranks of whole `values`, cut like `params`."""
    parts = [leaf for leaf in tree.leaves(params, _is_shard) if _is_shard(leaf)]
    if not parts:
        return values
    sums = scatter_sum(tree.leaves(values), [part.dim for part in parts], parts[0].axis)
    return tree.like(params, sums)


def _gathered(locals: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    dims, axis = [part.dim for part in parts], parts[0].axis
    rounded = [local.to(part.axis.gathered or local.dtype) for local, part in zip(locals, parts, strict=True)]
    return [whole.to(local.dtype) for whole, local in zip(gather(rounded, dims, axis), locals, strict=True)]


def _wide(params: Tree) -> Tree:
    """Parameters whose gradients are float32 at least; what is widened for that still travels as it was."""

    def wide(leaf: Any) -> Any:
        if not _is_shard(leaf):
            return rounding.wide(leaf)
        local = rounding.wide(leaf.local)
        return leaf if local is leaf.local else Part(local, leaf.dim, attrs.evolve(leaf.axis, gathered=leaf.local.dtype))

    return pytree.tree_map(wide, params, is_leaf=_is_shard)


def _is_shard(value: Any) -> bool:
    return isinstance(value, Part) and value.axis.name == "shard"


def _is_spread(params: Tree) -> bool:
    return any(part.axis.size > 1 for part in tree.leaves(params, _is_shard) if _is_shard(part))
