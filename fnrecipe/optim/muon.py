"""Muon: momentum, made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.moments import momentum
from fnrecipe.optim.polar import JORDAN, PolarMethod, polar_factor
from fnrecipe.optim.schedule import Scheduled
from fnrecipe.optim.transform import Report, Transform, chain, stateless
from fnrecipe.parallel.mesh import global_slice, is_shard
from fnrecipe.tree import Tree

Scale: TypeAlias = Literal["jordan", "spectral", "match_rms"]
SCALES: dict[Scale, Callable[[int, int], float]] = {
    "jordan": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "match_rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""What a polar factor of so many rows (outputs) and columns (inputs) is multiplied by.

spectral   each update changes outputs by as much, at any width (Bernstein & Newhouse 2024, arXiv:2410.21265)
match_rms  its root mean square is that of AdamW's, whose rates and decay fit (Liu et al. 2025, arXiv:2502.16982)
"""


def scale_by_muon(
    decay: Scheduled = 0.95, *, nesterov: bool = True, method: PolarMethod = JORDAN, scale: Scale = "jordan"
) -> Transform:
    """Muon's direction, of matrices only (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalised.

    It is for the matrices inside of layers: embeddings, the head and vectors have another optimizer, by `optim.split`.
    """
    return chain(momentum(decay, nesterov=nesterov, average=True), orthogonalize(method), scale_by_shape(scale))


def orthogonalize(method: PolarMethod = JORDAN) -> Transform:
    """The polar factor of each matrix."""

    def polar(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(lambda u: polar_factor(u, method), updates), {}

    return stateless(polar, needs="matrices")


def scale_by_shape(scale: Scale) -> Transform:
    """Each matrix times the number that `SCALES` has for its last two sides."""

    def scaled(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        factors = [SCALES[scale](*global_slice(leaf)[0][-2:]) for leaf in tree.leaves(updates, is_shard)]
        return tree.like(updates, [u * factor for u, factor in zip(tree.leaves(updates), factors, strict=True)]), {}

    return stateless(scaled)
