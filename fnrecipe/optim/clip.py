"""Clipping of gradients: of all together, of each tensor, of each row."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.transform import MeanGradient, Report, Transform, chain, stateless
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.tree import Tree


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scales all gradients by the same factor so that their global norm is at most `max_norm`, as torch's clipping does."""

    def clip(gradients: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        factor = clip_factor(global_norm(gradients), max_norm)
        return tree.map(lambda g: g * factor, gradients), {}

    return stateless(clip)


def clipped(transform: Transform, max_norm: float | None) -> Transform:
    """`transform` behind clipping by global norm, fused if it is; without clipping if `max_norm` is None.

    The state is that of a chain of both.
    """
    if max_norm is None:
        return transform
    both = chain(clip_by_global_norm(max_norm), transform)
    fused, known = transform.fused_update, transform.bounded
    if fused is None or known is None:
        return both

    def clip(gradients: MeanGradient) -> MeanGradient:
        factor = clip_factor(gradients.norm, max_norm)
        return attrs.evolve(gradients, count=gradients.count / factor, norm=gradients.norm * factor)

    def fused_update(
        gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
    ) -> tuple[Tree, Tree, Report]:
        params, inner, report = fused(clip(gradients), state[1], params, step, accept, key)
        return params, (state[0], inner), report

    def bounded(gradients: MeanGradient, state: Tree, params: Tree, step: Tensor) -> Tensor:
        return known(clip(gradients), state[1], params, step)

    return attrs.evolve(both, fused_update=fused_update, bounded=bounded)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clipping multiplies gradients of this norm by, []."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def clip_by_tensor_norm(max_norm: float) -> Transform:
    """Scales each gradient so that its Euclidean norm is at most `max_norm`."""

    def clip(gradients: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(lambda g: g / torch.clamp(g.square().sum().sqrt() / max_norm, min=1.0), gradients), {}

    return stateless(clip, needs="matrices")


def clip_adaptively(clipping: float = 0.01, eps: float = 1e-3) -> Transform:
    """Scales each row of a gradient so that its norm is at most `clipping` times that of the parameter's row, or `eps` if more.

    (Adaptive gradient clipping, Brock et al. 2021, arXiv:2102.06171.) A row are the weights of one output; a vector is one row.
    """

    def clipped(gradient: Tensor, parameter: Tensor) -> Tensor:
        most = clipping * _row_norms(parameter).clamp(min=eps)
        norms = _row_norms(gradient)
        return torch.where(norms > most, gradient * (most / norms.clamp(min=1e-6)), gradient)

    def clip(gradients: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(clipped, gradients, params), {}

    return stateless(clip, needs="matrices")


def _row_norms(tensor: Tensor) -> Tensor:
    """Norms [..., 1] of a tensor's rows."""
    return tensor.square().sum(-1, keepdim=True).sqrt() if tensor.ndim else tensor.abs()
