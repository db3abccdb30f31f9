"""Sharding as a transform of the gradient: when parameters are unsharded, and when gradients are reduced.

The state is always sharded; under `replicate` the shard axis has one rank. The other modes shard parameters and optimizer state
over it, and differ in when they all-gather parameters and reduce-scatter gradients:

    zero1   all-gather before the microbatches, reduce-scatter after them
    zero2   all-gather before the microbatches, reduce-scatter within the backward pass of each
    fsdp    all-gather in each layer of each microbatch, again in its backward pass, and reduce-scatter there

(ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; stages 1, 2 and 3.) All modes add the same summands in the same order, because
`fnrecipe.data.LaneAssignment` gives each rank the microbatches for which what is reduced over ranks first are neighbours in the
binary tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad

from fnrecipe import random, tree
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim import stochastic_rounding
from fnrecipe.optim.loss_scale import scale_loss
from fnrecipe.optim.partition import Mask, chosen, everything, merged, subset
from fnrecipe.parallel.collectives import all_reduce, reduce_scatter
from fnrecipe.parallel.mesh import Mesh, Shard
from fnrecipe.transforms.accumulate import accumulate
from fnrecipe.transforms.region import region
from fnrecipe.transforms.unshard import on_shard_axis, unshard, with_bucketed_gradients
from fnrecipe.tree import Tree


def gradients(
    loss: Loss, num_microbatches: int = 1, mesh: Mesh = Mesh(), trains: Mask = everything
) -> Callable[..., tuple[Tree, Sums]]:
    """`(params, batch, key, scale) -> (gradient, sums)` over the microbatches of all ranks, `num_microbatches` of each.

    The gradient is that of the loss times `scale` (`fnrecipe.optim.loss_scale`), for the parameters that `trains` holds for: a
    `fnrecipe.optim.partition.subset` of `params`, cut like them, in float32 at least. For the others none is computed. `loss`
    gets unsharded parameters; only under `fsdp` does it get shards, which `unsharded_layer` and `unshard` gather.

    `key`, int64 [2], is the step's: that of a microbatch is folded from it and the microbatch's number among all ranks' ones.
    """
    of_microbatch, add = _of_microbatch(num_microbatches, mesh), _into_copy if mesh.ranks == 1 else torch.add

    def after_microbatches(params: Tree, rows: Tree, scale: Tree, trained: frozenset[str]) -> tuple[Tree, Sums]:
        def slope(given: tuple[Tree, Tree], rows: Tree) -> tuple[Tree, Sums]:
            params, scale = given
            return _slope(scale_loss(loss, scale), _wide(params, trained), rows, trained)

        gradient, sums = accumulate(of_microbatch(slope), num_microbatches, add)((unshard(params), scale), rows)
        return _cut_sum(gradient, subset(params, trained)), all_reduce(sums, mesh.shard)

    def in_microbatches(loss: Loss, params: Tree, rows: Tree, trained: frozenset[str]) -> tuple[Tree, Sums]:
        def microbatch(params: Tree, rows: Tree) -> tuple[Tree, Sums]:
            gradient, sums = _slope(loss, params, rows, trained)
            return gradient, all_reduce(sums, mesh.shard)

        found: tuple[Tree, Sums] = accumulate(microbatch, num_microbatches)(params, rows)
        return found

    def of_replica(params: Tree, rows: Tree, scale: Tree, trained: frozenset[str]) -> tuple[Tree, Sums]:
        times = scale_loss(loss, scale)
        match mesh.sharding:
            case "fsdp":
                return in_microbatches(times, _wide(params, trained), rows, trained)
            case "zero2":
                wide = _wide(params, trained)
                gathered = unshard(wide)

                def of_gathered(params: Tree, batch: Tree, key: Tensor | None) -> tuple[Tensor, Sums]:
                    lent = with_bucketed_gradients(subset(gathered, trained), subset(params, trained))
                    return times(merged(gathered, lent), batch, key)

                return in_microbatches(of_gathered, wide, rows, trained)
            case _:
                return after_microbatches(params, rows, scale, trained)

    def of_all(params: Tree, batch: Tree, key: Tensor, scale: Tree = ()) -> tuple[Tree, Sums]:
        numbers, trained = mesh.microbatches(num_microbatches), chosen(params, trains)
        keys = random.fold_in(key, torch.arange(numbers.start, numbers.stop, numbers.step, device=key.device))
        gradient, sums = all_reduce(of_replica(params, (batch, keys), scale, trained), mesh.replica)
        return tree.like(subset(params, trained), tree.leaves(gradient)), sums

    return of_all


def evaluation(loss: Loss, num_microbatches: int = 1, mesh: Mesh = Mesh()) -> Callable[[Tree, Tree], Sums]:
    """`(params, batch) -> sums` over the microbatches of all ranks, without gradients and without a key."""

    of_microbatch = _of_microbatch(num_microbatches, mesh)

    def microbatch(params: Tree, batch: Tree) -> Sums:
        sums = loss(params, batch, None)[1]
        return all_reduce(sums, mesh.shard) if mesh.in_turns else sums

    def of_replica(params: Tree, batch: Tree) -> Sums:
        given = params if mesh.sharding == "fsdp" else unshard(params)
        sums: Sums = accumulate(of_microbatch(microbatch), num_microbatches)(given, batch)
        return sums if mesh.in_turns else dict(all_reduce(sums, mesh.shard))

    return lambda params, batch: all_reduce(of_replica(params, batch), mesh.replica)


def _slope(loss: Loss, params: Tree, rows: Tree, trained: frozenset[str]) -> tuple[Tree, Sums]:
    """The gradient of the loss for the trained among `params`, and its sums; rows: a microbatch and its key [1, 2]."""
    batch, keys = rows

    def of_trained(values: Tree) -> tuple[Tensor, Sums]:
        return loss(merged(params, values), batch, keys[0])

    found: tuple[Tree, Sums] = grad(of_trained, has_aux=True)(subset(params, trained))
    return found


def _of_microbatch(num_microbatches: int, mesh: Mesh) -> Callable[[Callable[..., Tree]], Callable[..., Tree]]:
    """How functions of a microbatch are traced: as a region if there are several, but not among ranks, where they overlap."""
    return partial(region, name="microbatch") if mesh.ranks == 1 and num_microbatches > 1 else lambda function: function


def _into_copy(left: Tensor, right: Tensor) -> Tensor:
    """Their sum. `jit` drops the copy, since nobody reads `left` any more, and adds into `left` itself."""
    return left.clone().add_(right)


def _cut_sum(values: Tree, params: Tree) -> Tree:
    """The sums over the ranks of whole `values`, cut like `params`."""
    parts = [leaf for leaf in tree.leaves(params, on_shard_axis) if on_shard_axis(leaf)]
    if not parts:
        return values
    sums = reduce_scatter(tree.leaves(values), [part.dim for part in parts], parts[0].axis)
    return tree.like(params, sums)


def _wide(params: Tree, trained: frozenset[str]) -> Tree:
    """Parameters whose gradients, where they are trained, are float32 at least; what is widened for that travels as it was."""

    def wide(leaf: Tree) -> Tensor | Shard:
        if not on_shard_axis(leaf):
            return stochastic_rounding.wide(leaf)
        local = stochastic_rounding.wide(leaf.local)
        return leaf if local is leaf.local else Shard(local, leaf.dim, attrs.evolve(leaf.axis, gathered=leaf.local.dtype))

    return merged(params, pytree.tree_map(wide, subset(params, trained), is_leaf=on_shard_axis))
