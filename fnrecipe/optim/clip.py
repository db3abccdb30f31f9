"""Clipping of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.transform import Report, Transform, stateless
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.tree import Tree


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scales all gradients by the same factor so that their global norm is at most `max_norm`, as torch's clipping does."""

    def clip(gradients: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        factor = clip_factor(global_norm(gradients), max_norm)
        return tree.map(lambda g: g * factor, gradients), {}

    return stateless(clip)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clipping multiplies gradients of this norm by, []."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
