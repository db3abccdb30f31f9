"""DPO: direct preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Criterion
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.models import answers


@frozen
class DPOConfig:
    beta: Positive = 0.1
    nll_scale: NonNegative = 0.0
    length_normalization: bool = False
    label_smoothing: ProperFraction = 0.0


def dpo(config: DPOConfig) -> answers.Judge:
    from fnrecipe.models import preference
    from fnrecipe.models.answers import Answers, in_pairs

    def ratios(answers: Answers) -> Tensor:
        return answers.ratios / answers.tokens.clamp(min=1) if config.length_normalization else answers.ratios

    def losses(chosen: Answers, rejected: Answers) -> Tensor:
        return preference.dpo(ratios(chosen), ratios(rejected), beta=config.beta, label_smoothing=config.label_smoothing)

    return in_pairs(losses, lambda answers: config.beta * ratios(answers), config.nll_scale)


criterion = Criterion(DPOConfig, dpo, reference=True)
