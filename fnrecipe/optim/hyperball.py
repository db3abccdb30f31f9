"""Hyperball: matrices move on the sphere of their norm."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim.descent import scale_by_learning_rate
from fnrecipe.optim.schedule import Schedule
from fnrecipe.optim.transform import Report, Transform, chain, stateless
from fnrecipe.tree import Tree


def hyperball(schedule: Schedule) -> Transform:
    """The end of an update by which no tensor changes its norm, in place of weight decay and learning rate.

    The direction u of a parameter p becomes a step to p - rate |p| u / |u|, and from there back to the norm of p. Behind any
    direction: `chain(scale_by_muon(), hyperball(schedule))` is MuonH. (modded-nanogpt, track 3.)
    """
    return chain(scale_by_parameter_norm(), scale_by_learning_rate(schedule), keep_parameter_norm())


def scale_by_parameter_norm() -> Transform:
    """Gives each update the Euclidean norm of its parameter; 0 stays 0."""

    def scaled(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(lambda u, p: u * (_norm(p) / _norm(u).clamp(min=1e-10)), updates, params), {}

    return stateless(scaled, needs="matrices")


def keep_parameter_norm() -> Transform:
    """Scales what each update leads to so that it has the norm of the parameter."""

    def kept(update: Tensor, parameter: Tensor) -> Tensor:
        there = parameter + update
        return there * (_norm(parameter) / _norm(there).clamp(min=1e-10)) - parameter

    def keep(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Report]:
        return tree.map(kept, updates, params), {}

    return stateless(keep, needs="matrices")


def _norm(tensor: Tensor) -> Tensor:
    return tensor.square().sum().sqrt()
