"""Dion2: Muon of the largest rows or columns of the momentum, which keeps what it did not use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import zeros
from fnrecipe.optim.muon import Scale, scale_by_shape
from fnrecipe.optim.polar import POLAR_EXPRESS, PolarMethod, polar_factor
from fnrecipe.optim.transform import Report, Transform, chain
from fnrecipe.tree import Tree


def scale_by_dion2(
    fraction: float = 0.25, decay: float = 0.95, *, method: PolarMethod = POLAR_EXPRESS, scale: Scale = "spectral"
) -> Transform:
    """Dion2's direction, of matrices only (Ahn et al. 2025, arXiv:2512.16928): `scale_by_muon` of a part of each matrix."""
    return chain(orthogonalize_largest(fraction, decay, method), scale_by_shape(scale))


def orthogonalize_largest(fraction: float, decay: float, method: PolarMethod = POLAR_EXPRESS) -> Transform:
    """The polar factor of the largest rows of the sum of gradients, or columns if these are fewer; 0 elsewhere.

    Of n rows, ceil(fraction * n) with the greatest sum of magnitudes are taken, the first ones of equals. They are `decay`
    times smaller afterwards; what was not taken stays as it is, and so grows until it is (error feedback).

    State: `momentum`, like the parameters.
    """

    def leaf(momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        total = momentum + gradient
        along = -2 if total.shape[-2] <= total.shape[-1] else -1
        taken = _largest(total, along, math.ceil(fraction * total.shape[along]))
        part = total.gather(along, taken)
        factor = torch.zeros_like(total).scatter(along, taken, polar_factor(part, method))
        return factor, total.scatter(along, taken, part * decay)

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        found = [leaf(*pair) for pair in zip(tree.leaves(state["momentum"]), tree.leaves(gradients), strict=True)]
        factors, momentum = (tree.like(gradients, tensors) for tensors in zip(*found, strict=True))
        return factors, {"momentum": momentum}, {}

    return Transform(lambda params: zeros(params, "momentum"), update, needs="matrices")


def _largest(matrix: Tensor, along: int, count: int) -> Tensor:
    """Where the `count` largest rows (`along` -2) or columns (-1) of [..., r, c] are, as an index for `gather` along them."""
    across = -3 - along
    order = matrix.abs().sum(across).argsort(dim=-1, descending=True, stable=True)[..., :count].unsqueeze(across)
    return order.expand(*(count if dim == along else matrix.shape[dim] for dim in range(-matrix.ndim, 0)))
