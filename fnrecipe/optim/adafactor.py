"""Adafactor: second moments of matrices in the memory of their rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.descent import descent
from fnrecipe.optim.moments import counter
from fnrecipe.optim.partition import Mask, matrices
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.transform import Report, Transform, stateless
from fnrecipe.tree import Tree


def adafactor(
    schedule: Schedule,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: Scheduled = 0.0,
    mask: Mask = matrices,
    max_norm: float | None = None,
) -> Transform:
    """Adafactor with steps relative to the size of parameters (Shazeer & Stern 2018, arXiv:1804.04235).

    The rate is `schedule(step)`, but at most 1 / sqrt(step), and what a parameter's root mean square, at least `eps[1]`, is
    multiplied by. As torch.optim.Adafactor, but that the bound holds for weight decay, too.
    """

    def bounded(step: Tensor) -> Tensor:
        return torch.minimum(schedule(step), step.to(torch.float64).rsqrt())

    directions = scale_by_factored_rms(beta2_decay, eps[0], d), scale_by_parameter_rms(eps[1])
    return descent(*directions, schedule=bounded, weight_decay=weight_decay, mask=mask, max_norm=max_norm)


def scale_by_factored_rms(beta2_decay: float = -0.8, eps: float | None = None, d: float = 1.0) -> Transform:
    """Gradients over the root of a running mean of squares; the root mean square of each tensor is then at most `d`.

    The mean of a matrix [..., r, c] is kept as those of rows and columns, [..., r, 1] and [..., 1, c], whose product over the
    mean of all is taken in its place; that of a vector is kept as it is. Update t forgets 1 - t ** beta2_decay of what was.
    `eps` bounds roots from below; None: the smallest difference from 1 in the dtype.

    State: `squares`, a tuple of one or two tensors for each parameter, by path; `count`, int64 [], of the updates made.
    """

    def init(params: Tree) -> Tree:
        return {"squares": {path: _squares(leaf) for path, leaf in tree.paths(params).items()}, "count": counter(params)}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count = state["count"] + 1
        weight = torch.pow(count.to(torch.float64), beta2_decay)
        squares, direction = {}, {}
        for path, gradient in tree.paths(gradients).items():
            least = torch.finfo(gradient.dtype).eps if eps is None else eps
            now = _means(gradient)
            before = state["squares"][path]
            squares[path] = tuple(torch.lerp(old, new, weight.to(new.dtype)) for old, new in zip(before, now, strict=True))
            scaled = gradient * _estimate(squares[path], least).clamp(min=least**2).rsqrt()
            direction[path] = scaled / torch.clamp(_rms(scaled) / d, min=1.0)
        return tree.from_paths(gradients, direction), {"squares": squares, "count": count}, {}

    return Transform(init, update, needs="matrices")


def scale_by_parameter_rms(least: float = 1e-3) -> Transform:
    """Scales each update by the root mean square of its parameter, or by `least` if that is more."""

    def scale(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(lambda u, p: u * torch.clamp(_rms(p), min=least), updates, params), {}

    return stateless(scale, needs="matrices")


def _squares(parameter: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(torch.zeros_like, _means(parameter)))


def _means(gradient: Tensor) -> tuple[Tensor, ...]:
    """Means of squares of rows and of columns, or the squares."""
    square = gradient.square()
    return (square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)) if gradient.ndim > 1 else (square,)


def _estimate(means: tuple[Tensor, ...], least: float) -> Tensor:
    """The running mean of squares that means of rows and columns stand for."""
    if len(means) == 1:
        return means[0]
    rows, columns = means
    return rows * columns / rows.mean(-2, keepdim=True).clamp(min=least)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
