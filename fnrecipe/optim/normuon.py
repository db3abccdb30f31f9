"""NorMuon: Muon whose rows, one a neuron, are of one size over time."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import momentum
from fnrecipe.optim.muon import Scale, orthogonalize, scale_by_shape
from fnrecipe.optim.polar import JORDAN, PolarMethod
from fnrecipe.optim.schedule import Scheduled
from fnrecipe.optim.transform import Report, Transform, chain
from fnrecipe.tree import Tree


def scale_by_normuon(
    decay: Scheduled = 0.95,
    b2: float = 0.95,
    *,
    nesterov: bool = True,
    method: PolarMethod = JORDAN,
    scale: Scale = "jordan",
) -> Transform:
    """NorMuon's direction, of matrices only (Li et al. 2025, arXiv:2510.05491): `scale_by_muon` with its rows normalised."""
    return chain(
        momentum(decay, nesterov=nesterov, average=True), orthogonalize(method), normalize_rows(b2), scale_by_shape(scale)
    )


def normalize_rows(b2: float = 0.95, eps: float = 1e-8) -> Transform:
    """Each row over the root of a running mean of its mean square; each matrix keeps its norm, so no bias is to be corrected.

    State: `square`, [..., r, 1] for a parameter [..., r, c].
    """

    def init(params: Tree) -> Tree:
        return {"square": tree.map(lambda p: torch.zeros_like(p[..., :1]), params)}

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        square = tree.map(lambda s, u: torch.lerp(s, u.square().mean(-1, keepdim=True), 1 - b2), state["square"], updates)

        def normalized(update: Tensor, square: Tensor) -> Tensor:
            rows = update / (square.sqrt() + eps)
            least = torch.finfo(update.dtype).tiny
            return rows * (_norm(update) / _norm(rows).clamp(min=least))

        return tree.map(normalized, updates, square), {"square": square}, {}

    return Transform(init, update, needs="matrices")


def _norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum((-2, -1), keepdim=True).sqrt()
