"""NorMuon for the matrices inside of layers, AdamW for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.components.optimizers.muon import MuonConfig, beside_adamw, polar_method, width_power
from fnrecipe.config.bounds import ProperFraction

if TYPE_CHECKING:
    from fnrecipe.optim import Schedules, Transform


@frozen
class NorMuonConfig(MuonConfig):
    beta2: ProperFraction = 0.95


def normuon(config: NorMuonConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    direction = optim.scale_by_normuon(
        schedule.momentum(config.momentum),
        config.beta2,
        nesterov=config.nesterov,
        method=polar_method(config),
        scale=config.scale,
    )
    return beside_adamw(config, direction, schedule, max_norm)


optimizer = Optimizer(
    NorMuonConfig,
    normuon,
    moments=1,
    momentum=lambda config: config.momentum,
    transfers=True,
    width_power=width_power,
    low_precision=True,
)
