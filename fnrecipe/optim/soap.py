"""SOAP: Adam in the eigenbasis of Shampoo."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.eigenbasis import eigenbasis
from fnrecipe.optim.moments import counter, running_mean, zeros
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.tree import Tree


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_decay: float = 0.95,
    every: int = 10,
    max_dim: int = 10_000,
    rows: bool = True,
) -> Transform:
    """SOAP's direction, of matrices only (Vyas et al. 2024, arXiv:2409.11321).

    Running means of G Gᵀ and Gᵀ G, at `shampoo_decay`, have eigenvectors L and R, which are renewed in each update that `every`
    divides. Adam's mean square is one of Lᵀ G R, and its direction is made in that basis and turned back. A side of more than
    `max_dim` is not turned, nor are rows without `rows`: with no side, it is Adam. As in the authors' code the first gradient
    gives bases and no update.

    State: `mean` and `square`, like the parameters; `left`, `right`, `left_basis` and `right_basis`, square matrices, [0, 0]
    for sides that are not turned; `count`, int64 [], of the gradients seen.
    """

    def init(params: Tree) -> Tree:
        def side(dim: int, most: int) -> Tree:
            return tree.map(lambda p: p.new_zeros((p.shape[dim],) * 2 if p.shape[dim] <= most else (0, 0)), params)

        lefts, rights = (partial(side, 0, max_dim if rows else 0), partial(side, 1, max_dim))
        sides = {"left": lefts(), "right": rights(), "left_basis": lefts(), "right_basis": rights()}
        return {**zeros(params, "mean", "square"), **sides, "count": counter(params)}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count = state["count"]
        number = count.clamp(min=1).to(torch.float64)
        scale, root = 1 / (1 - torch.pow(b1, number)), 1 / (1 - torch.pow(b2, number)).sqrt()
        left, right = state["left_basis"], state["right_basis"]
        begun = count > 0
        mean = tree.select(begun, running_mean(state["mean"], gradients, b1), state["mean"])

        def squared(s: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return torch.where(begun, torch.lerp(s, _turned(g, a, b).square(), 1 - b2), s)

        def directed(m: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
            inner = (_turned(m, a, b) * scale / (s.sqrt() * root + eps)).to(m.dtype)
            return torch.where(begun, _turned(inner, a.mT, b.mT), 0.0)

        square = tree.map(squared, state["square"], gradients, left, right)
        direction = tree.map(directed, mean, square, left, right)
        moments = {
            "left": tree.map(partial(_moment, decay=shampoo_decay, dim=0), state["left"], gradients),
            "right": tree.map(partial(_moment, decay=shampoo_decay, dim=1), state["right"], gradients),
        }
        renewed = partial(_renewed, count=count, every=every)
        left, square = renewed(moments["left"], left, square, dim=0)
        right, square = renewed(moments["right"], right, square, dim=1)
        bases = {"left_basis": left, "right_basis": right}
        return direction, {"mean": mean, "square": square, **moments, **bases, "count": count + 1}, {}

    return Transform(init, update, needs="matrices")


def _turned(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ @ matrix @ right, where there is a basis."""
    matrix = left.mT @ matrix if len(left) else matrix
    return matrix @ right if len(right) else matrix


def _moment(moment: Tensor, gradient: Tensor, *, decay: float, dim: int) -> Tensor:
    if not len(moment):
        return moment
    return torch.lerp(moment, gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient, 1 - decay)


def _renewed(moments: Tree, bases: Tree, squares: Tree, *, count: Tensor, every: int, dim: int) -> tuple[Tree, Tree]:
    """Bases of one side, and the mean squares in their order along that side."""

    def leaf(moment: Tensor, basis: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        if not len(moment):
            return basis, square
        new, order = eigenbasis(moment, basis, count, every)
        return new, square.index_select(dim, order)

    found = [leaf(*trio) for trio in zip(*map(tree.leaves, (moments, bases, squares)), strict=True)]
    return tree.like(bases, [basis for basis, _ in found]), tree.like(squares, [square for _, square in found])
