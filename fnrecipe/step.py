"""The train step: one pure function `(state, batch) -> (state, metrics)`, built from a loss and an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.compiler.alias import storage
from fnrecipe.errors import UsageError
from fnrecipe.loss import Loss
from fnrecipe.optim import loss_scale, spikes
from fnrecipe.optim.average import Average, Averaging, init_average, update_average
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.partition import Mask, chosen, everything, merged, subset
from fnrecipe.optim.spikes import SpikeGuard
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.transforms import gradients
from fnrecipe.tree import Tree


@tree.node
@attrs.frozen(eq=False)
class State:
    """All that a step changes.

    params      tree of tensors, of which some may be frozen
    optimizer   tree of tensors, for the parameters that are trained
    step        int64 []   steps taken
    skipped     int64 []   the last so many of them were skipped, and not for the sake of the loss scale
    key         int64 [2]  of the run; randomness of a step comes from folding the step into it
    loss_scale  a `LossScale`, or () where the loss is not scaled
    average     an `Average` of the parameters that are trained, or () where none is kept
    spikes      a `SpikeWindow`, or () where no step is skipped as a spike
    """

    params: Tree
    optimizer: Tree
    step: Tensor
    skipped: Tensor
    key: Tensor
    loss_scale: Tree = ()
    average: Tree = ()
    spikes: Tree = ()


Metrics: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[State, Tree], tuple[State, Metrics]]


def init_state(
    params: Tree,
    update: Transform,
    key: Tensor,
    scaling: LossScaling | None = None,
    trains: Mask = everything,
    averaging: Averaging | None = None,
    guard: SpikeGuard | None = None,
) -> State:
    """The state before the first step, of whose parameters those are trained for which `trains` holds.

    Raises:
        UsageError: if none is.
    """

    def zero() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=key.device)

    trained = chosen(params, trains)
    if not trained:
        raise UsageError("trains: expected a parameter for which it holds, found none")
    optimizer = _with_own_memory(optim.init_parts(update, subset(params, trained)), params)
    scale = () if scaling is None else loss_scale.init_scale(scaling, key.device)
    average = () if averaging is None else init_average(subset(params, trained))
    window = () if guard is None else spikes.init_window(guard, key.device)
    return State(params, optimizer, zero(), zero(), key, scale, average, window)


def _with_own_memory(values: Tree, others: Tree) -> Tree:
    """`values`, with copies in place of those that share memory with `others` or each other."""
    taken = {storage(leaf) for leaf in tree.leaves(others)}

    def own(leaf: Tensor) -> Tensor:
        shared = storage(leaf) in taken
        taken.add(storage(leaf))
        return leaf.clone() if shared else leaf

    return tree.map(own, values)


def averaged(state: State) -> Tree:
    """The parameters, with their average in place of those that are trained; as they are where no average is kept."""
    return merged(state.params, state.average.mean) if isinstance(state.average, Average) else state.params


def shown(update: Transform, state: State, trains: Mask = everything) -> Tree:
    """The parameters that `update` would have a model evaluated and exported with; `trains` as `train_step` has it."""
    if update.shown is None:
        return state.params
    trained = subset(state.params, chosen(state.params, trains))
    return merged(state.params, update.shown(state.optimizer, trained))


def train_step(
    loss: Loss,
    update: Transform,
    num_microbatches: int = 1,
    mesh: Mesh = Mesh(),
    scaling: LossScaling | None = None,
    trains: Mask = everything,
    averaging: Averaging | None = None,
    guard: SpikeGuard | None = None,
) -> Step:
    """The step that averages the gradient of `loss` over all targets of the batch's microbatches, and applies `update`.

    Each rank of `mesh` gives its own `num_microbatches`.

    A step whose loss or gradient is not finite, or whose update would not be, leaves parameters and optimizer as they were:
    by `torch.where`, with no host sync. Metrics are 0-d tensors: the loss's sums, `grad_norm` before clipping, `skipped`, the
    update's reports, and the `loss_scale` of this step if there is one.

    Parameters that `trains` does not hold for are frozen: used, sharded and saved like the others, without gradient, moments
    and update.

    The key that `loss` gets is folded from the state's, the step's number and that of the microbatch among those of all ranks.

    `scaling` must be the one that the state was made with. A step that merely overflowed the loss scale, and halves it, does
    not count as skipped; one whose gradient is finite and whose update is not does: the scale has nothing to do with it.

    `averaging`, too: it averages the parameters behind the update, and skips with it.

    So must `guard`, by which a spike of the loss or of the gradient's norm is skipped, too; metrics then have `spike`, 1 or 0,
    and the limits that hold for the step.
    """
    gradients_and_sums = gradients(loss, num_microbatches, mesh, trains)

    def step(state: State, batch: Tree) -> tuple[State, Metrics]:
        scale, number = state.loss_scale, state.step + 1
        key = random.fold_in(random.fold_in(state.key, "loss"), number)
        totals, sums = gradients_and_sums(state.params, batch, key, scale)
        count = torch.clamp(sums["targets"], min=1)
        mean = optim.mean_gradient(totals, count if scaling is None else count * scale.value)
        finite = torch.isfinite(mean.norm) & torch.isfinite(sums["loss"])
        accept, window, of_spikes = finite, state.spikes, Metrics()
        if guard is not None:
            loss_mean, (loss_limit, norm_limit) = sums["loss"].double() / count, spikes.limits(guard, window)
            spike = finite & ((loss_mean > loss_limit) | (mean.norm > norm_limit))
            accept = finite & ~spike
            of_spikes = {"spike": spike.to(torch.int64), "loss_limit": loss_limit, "grad_norm_limit": norm_limit}
        trained = subset(state.params, chosen(state.params, trains))
        trained, optimizer, report, made = optim.guarded_update(
            update, mean, state.optimizer, trained, number, accept, state.key
        )
        if guard is not None:
            window = spikes.update_window(window, loss_mean, mean.norm, made)
        spared = made
        if scaling is not None:
            report = {**report, "loss_scale": scale.value}
            scale, halved = loss_scale.update_scale(scaling, scale, finite)
            spared = made | halved
        skipped = torch.where(spared, 0, state.skipped + 1)
        average = state.average
        if averaging is not None:
            average = update_average(averaging, average, trained, number, made)
        metrics = {"step": number, **sums, "grad_norm": mean.norm, "skipped": skipped, **of_spikes, **report}
        return State(merged(state.params, trained), optimizer, number, skipped, state.key, scale, average, window), metrics

    return step
