"""CPO: contrastive preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Criterion
from fnrecipe.config.bounds import NonNegative, Positive, ProperFraction

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.models import answers


@frozen
class CPOConfig:
    beta: Positive = 1.0
    nll_scale: NonNegative = 1.0
    label_smoothing: ProperFraction = 0.0


def cpo(config: CPOConfig) -> answers.Judge:
    from fnrecipe.models import preference
    from fnrecipe.models.answers import Answers, in_pairs

    def losses(chosen: Answers, rejected: Answers) -> Tensor:
        return preference.cpo(chosen.sums, rejected.sums, beta=config.beta, label_smoothing=config.label_smoothing)

    return in_pairs(losses, lambda answers: config.beta * answers.sums, config.nll_scale)


criterion = Criterion(CPOConfig, cpo)
