"""Gradient descent with momentum."""

from __future__ import annotations

from fnrecipe.optim.clip import clip_by_global_norm
from fnrecipe.optim.descent import add_decayed_weights, scale_by_learning_rate
from fnrecipe.optim.moments import momentum
from fnrecipe.optim.partition import Mask, matrices
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.transform import Transform, chain


def sgd(
    schedule: Schedule,
    *,
    decay: Scheduled = 0.0,
    nesterov: bool = False,
    weight_decay: Scheduled = 0.0,
    mask: Mask = matrices,
    max_norm: float | None = None,
) -> Transform:
    """Descent along the sum of gradients, each `decay` times smaller a step; without one if `decay` is 0.

    Weight decay is L2 regularisation: it is a part of the gradient, behind clipping, and goes into the sum, as in
    torch.optim.SGD. (Polyak 1964; Sutskever et al. 2013 for Nesterov's form.)
    """
    clip = [] if max_norm is None else [clip_by_global_norm(max_norm)]
    regularize = [] if weight_decay == 0 else [add_decayed_weights(weight_decay, mask)]
    total = [] if decay == 0 else [momentum(decay, nesterov=nesterov)]
    return chain(*clip, *regularize, *total, scale_by_learning_rate(schedule))
