"""ORPO: odds ratio preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Criterion
from fnrecipe.config.bounds import NonNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.models import answers


@frozen
class ORPOConfig:
    orpo_lambda: Positive = 1.0
    nll_scale: NonNegative = 1.0


def orpo(config: ORPOConfig) -> answers.Judge:
    from fnrecipe.models import preference
    from fnrecipe.models.answers import Answers, in_pairs

    def losses(chosen: Answers, rejected: Answers) -> Tensor:
        return config.orpo_lambda * preference.orpo(chosen.means, rejected.means)

    return in_pairs(losses, lambda answers: config.orpo_lambda * answers.means, config.nll_scale)


criterion = Criterion(ORPOConfig, orpo)
