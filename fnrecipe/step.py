"""The train step: one pure function `(state, batch) -> (state, metrics)`, built from a loss and an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.func import grad

from fnrecipe import optim, tree
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim import Transform
from fnrecipe.transforms import accumulate
from fnrecipe.tree import Tree


@tree.node
@attrs.frozen(eq=False)
class State:
    """All that a step changes.

    params, optimizer  trees of tensors
    step     int64 []   steps taken
    skipped  int64 []   the last so many of them were skipped
    key      int64 [2]  of the run; randomness of a step comes from folding the step into it
    """

    params: Tree
    optimizer: Any
    step: Tensor
    skipped: Tensor
    key: Tensor


Metrics: TypeAlias = dict[str, Any]
Reduce: TypeAlias = Callable[[Tree], Tree]
Step: TypeAlias = Callable[[State, Any], tuple[State, Metrics]]


def init_state(params: Tree, update: Transform, key: Tensor) -> State:
    def zero() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=key.device)

    optimizer = tree.map(torch.clone, update.init(params))  # what starts as the parameters must not stay them
    return State(params, optimizer, zero(), zero(), key)


def train_step(loss: Loss, update: Transform, num_leaves: int = 1, reduce: Reduce = lambda sums: sums) -> Step:
    """The step that averages the gradient of `loss` over all targets of the batch's leaves, and applies `update`.

    `reduce` sums over the ranks of a gang (`transforms.tree_sum`), each of which gives its own `num_leaves` leaves.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were: by selection, without the
    host. Metrics are 0-d tensors: the loss's sums, `gradient_norm` before clipping, `skipped`, and the update's reports.
    """
    gradients_and_sums = accumulate(grad(loss, has_aux=True), num_leaves)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        totals, sums = reduce(gradients_and_sums(state.params, batch))
        count = torch.clamp(sums["targets"], min=1)
        gradients = tree.map(lambda g: g / count, totals)
        norm = tree.global_norm(gradients)
        number = state.step + 1
        finite = torch.isfinite(norm) & torch.isfinite(sums["loss"])
        params, optimizer, report = optim.apply(update, gradients, state.optimizer, state.params, number, finite)
        skipped = torch.where(finite, 0, state.skipped + 1)
        metrics = {"step": number, **sums, "gradient_norm": norm, "skipped": skipped, **report}
        return State(params, optimizer, number, skipped, state.key), metrics

    return step


def evaluation(loss: Loss, num_leaves: int = 1, reduce: Reduce = lambda sums: sums) -> Callable[[Tree, Any], Sums]:
    """The sums of `loss` over a batch, without gradients, and over the ranks of a gang."""
    sums = accumulate(lambda params, batch: loss(params, batch)[1], num_leaves)
    return lambda params, batch: reduce(sums(params, batch))
