"""Dion2 for the matrices inside of layers, AdamW for the rest; defaults are those of the authors' code."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attrs import field, frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.components.optimizers.muon import Coefficients, MatrixConfig, Scale, beside_adamw, polar_method
from fnrecipe.config.bounds import NonNegative, PositiveFraction, ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class Dion2Config(MatrixConfig):
    """`fraction`: of the rows or columns of a matrix, those that an update moves; `ef_decay`: their momentum's, afterwards."""

    lr: NonNegative = 0.01
    coefficients: Coefficients = "polar_express"
    scale: Scale = "spectral"
    weight_decay: NonNegative = 0.01
    adamw: AdamWConfig = field(factory=partial(AdamWConfig, weight_decay=0.01))
    fraction: PositiveFraction = 0.25
    ef_decay: ProperFraction = 0.95


def dion2(config: Dion2Config, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    direction = optim.scale_by_dion2(config.fraction, config.ef_decay, method=polar_method(config), scale=config.scale)
    return beside_adamw(config, direction, schedule, max_norm)


optimizer = Optimizer(Dion2Config, dion2, moments=1)
