"""SimPO: simple preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Criterion
from fnrecipe.config.bounds import NonNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.models import answers


@frozen
class SimPOConfig:
    beta: Positive = 1.0
    gamma: NonNegative = 0.5
    nll_scale: NonNegative = 0.0


def simpo(config: SimPOConfig) -> answers.Judge:
    from fnrecipe.models import preference
    from fnrecipe.models.answers import Answers, in_pairs

    def losses(chosen: Answers, rejected: Answers) -> Tensor:
        return preference.simpo(chosen.means, rejected.means, beta=config.beta, gamma=config.gamma)

    return in_pairs(losses, lambda answers: config.beta * answers.means, config.nll_scale)


criterion = Criterion(SimPOConfig, simpo)
