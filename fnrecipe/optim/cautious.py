"""Cautious updates: nothing is changed against the gradient."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.transform import Report, Transform, init_parts, stateless, update_parts
from fnrecipe.tree import Tree


def cautious(direction: Transform) -> Transform:
    """`direction` where it has the sign of the gradient, over the share of a tensor's elements that have; 0 elsewhere.

    (Liang et al. 2024, arXiv:2411.16085; with `scale_by_adam` it is C-AdamW.) The state is that of `direction`.
    """

    def agreeing(updates: Tree, gradients: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(_agreeing, updates, gradients), {}

    mask = stateless(agreeing, needs="matrices")  # with gradients in the place of parameters

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        directed, new, report = update_parts(direction, gradients, state, params, step)
        masked, _, _ = update_parts(mask, directed, (), gradients, step)
        return masked, new, report

    return Transform(lambda params: init_parts(direction, params), update)


def _agreeing(update: Tensor, gradient: Tensor) -> Tensor:
    agrees = (update * gradient > 0).to(update.dtype)
    return update * agrees / agrees.mean().clamp(min=1e-3)
