"""Muon for the matrices inside of layers, AdamW for the rest; defaults are those of the author's code.

But weight decay, without which matrices grow in long trainings: that is torch.optim.Muon's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.components.optimizers.adamw import AdamWConfig, adamw
from fnrecipe.config.bounds import NonNegative, ProperFraction
from fnrecipe.config.patterns import fits, tag_conflicts
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.optim import PolarMethod, Schedules, Transform

Coefficients = Literal["jordan", "polar_express"]
Scale = Literal["jordan", "spectral", "match_rms"]


@frozen
class MatrixConfig:
    """The base of configs of optimizers whose direction is orthogonal, beside AdamW.

    `adamw_params`: patterns of the paths, or tags, of the matrices that AdamW takes; those in layers are not AdamW's.
    """

    lr: NonNegative = 0.02
    coefficients: Coefficients = "jordan"
    scale: Scale = "jordan"
    weight_decay: NonNegative = 0.1
    cautious_weight_decay: bool = False
    adamw_params: tuple[str, ...] = ("*embed*", "*positions*", "*head*")
    adamw: AdamWConfig = field(factory=partial(AdamWConfig, eps=1e-10))

    def conflicts(self) -> Iterator[Problem]:
        yield from tag_conflicts("adamw_params", self.adamw_params)


@frozen
class MuonConfig(MatrixConfig):
    momentum: ProperFraction = 0.95
    nesterov: bool = True


def muon(config: MuonConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    momentum = schedule.momentum(config.momentum)
    direction = optim.scale_by_muon(momentum, nesterov=config.nesterov, method=polar_method(config), scale=config.scale)
    return beside_adamw(config, direction, schedule, max_norm)


def beside_adamw(config: MatrixConfig, direction: Transform, schedule: Schedules, max_norm: float | None) -> Transform:
    """The direction for matrices, AdamW for those that the config names and for vectors; clipping sees all gradients.

    A schedule of momentum is that of the direction alone.
    """
    from fnrecipe import optim

    def hidden(path: str, parameter: Tensor) -> bool:
        return parameter.ndim == 2 and not fits(path, 2, config.adamw_params)

    matrices = optim.descent(
        direction,
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        cautious_weight_decay=config.cautious_weight_decay,
    )
    others = adamw(config.adamw, optim.Schedules(schedule.rate, schedule.decay), None)
    both = optim.split(hidden, matrices, others)
    return both if max_norm is None else optim.chain(optim.clip_by_global_norm(max_norm), both)


def polar_method(config: MatrixConfig) -> PolarMethod:
    from fnrecipe import optim

    return {"jordan": optim.JORDAN, "polar_express": optim.POLAR_EXPRESS}[config.coefficients]


def width_power(config: MuonConfig) -> float:
    """A polar factor's scale by sides that all grow alike stays, or grows with their root."""
    return 0.5 if config.scale == "match_rms" else 0.0


optimizer = Optimizer(
    MuonConfig,
    muon,
    moments=1,
    momentum=lambda config: config.momentum,
    transfers=True,
    width_power=width_power,
    low_precision=True,
)
