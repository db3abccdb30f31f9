"""MARS: gradients whose variance is reduced by those of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.adamw import scale_by_adam
from fnrecipe.optim.clip import clip_by_tensor_norm
from fnrecipe.optim.moments import zeros
from fnrecipe.optim.transform import Report, Transform, chain
from fnrecipe.tree import Tree


def scale_by_mars(b1: float = 0.95, b2: float = 0.99, eps: float = 1e-8, *, gamma: float = 0.025) -> Transform:
    """MARS-AdamW's direction (Yuan et al. 2024, arXiv:2411.10438): Adam's of corrected gradients of at most norm 1 a tensor."""
    return chain(correct_by_last_gradient(gamma * b1 / (1 - b1)), clip_by_tensor_norm(1.0), scale_by_adam(b1, b2, eps))


def correct_by_last_gradient(weight: float) -> Transform:
    """Adds `weight` times what the gradient has changed since the last step.

    (The paper's approximation: exact would be the change of the gradient of one batch, which takes a second gradient.) State:
    `last`, like the parameters, 0 at first.
    """

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        corrected = tree.map(lambda g, last: torch.add(g, g - last, alpha=weight), gradients, state["last"])
        return corrected, {"last": gradients}, {}

    return Transform(lambda params: zeros(params, "last"), update)
