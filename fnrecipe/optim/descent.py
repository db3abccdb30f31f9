"""The ends of an update: clipping in front of a direction; weight decay and learning rate behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.clip import clip_by_global_norm
from fnrecipe.optim.partition import Mask, chosen, everything, matrices, merged, subset
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.transform import Report, Transform, chain, stateless
from fnrecipe.tree import Tree


def descent(
    *directions: Transform,
    schedule: Schedule,
    weight_decay: Scheduled = 0.0,
    mask: Mask = matrices,
    max_norm: float | None = None,
    cautious_weight_decay: bool = False,
) -> Transform:
    """`parameter -= schedule(step) * (direction + weight_decay * parameter)`, decay (at that step) where the mask holds.

    The directions are a chain, behind clipping by global norm if `max_norm` is given.
    """
    clip = [] if max_norm is None else [clip_by_global_norm(max_norm)]
    add = add_cautious_decayed_weights if cautious_weight_decay else add_decayed_weights
    decay = [] if weight_decay == 0 else [add(weight_decay, mask)]
    return chain(*clip, *directions, *decay, scale_by_learning_rate(schedule))


def add_decayed_weights(rate: Scheduled, mask: Mask = everything) -> Transform:
    """Adds `rate` times each parameter for which `mask` holds (decoupled decay, Loshchilov & Hutter, arXiv:1711.05101).

    A rate that changes over steps is reported as `weight_decay`.
    """
    return _add(rate, mask, lambda update, parameter: parameter)


def add_cautious_decayed_weights(rate: Scheduled, mask: Mask = everything) -> Transform:
    """As `add_decayed_weights`, of those elements that the updates, which are to be subtracted, bring nearer to 0 too.

    (Chen et al. 2025, arXiv:2510.12402.)
    """

    return _add(rate, mask, lambda update, parameter: torch.where(update * parameter >= 0, parameter, 0.0))


def _add(rate: Scheduled, mask: Mask, part: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    """Adds `rate` times `part(update, parameter)` where the mask holds."""

    def decay(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        of_those = partial(subset, paths=chosen(params, mask))
        if not callable(rate):
            added = tree.map(lambda u, p: torch.add(u, part(u, p), alpha=rate), of_those(updates), of_those(params))
            return merged(updates, added), {}
        now = rate(step)
        added = tree.map(lambda u, p: u + part(u, p) * now.to(u.dtype), of_those(updates), of_those(params))
        return merged(updates, added), {"weight_decay": now}

    return stateless(decay)


def scale_by_learning_rate(schedule: Schedule, name: str = "lr") -> Transform:
    """Scales by minus `schedule(step)`, and reports it as `name`."""

    def scale(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        rate = schedule(step)
        factor = -rate
        return tree.map(lambda u: (u * factor).to(u.dtype), updates), {name: rate}

    return stateless(scale)
