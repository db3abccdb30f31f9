"""KTO: Kahneman-Tversky optimization, of answers that are desirable or not, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Criterion
from fnrecipe.config.bounds import NonNegative, Positive

if TYPE_CHECKING:
    from fnrecipe.models import answers


@frozen
class KTOConfig:
    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0


def kto(config: KTOConfig) -> answers.Judge:
    """The divergence is the mean of the ratios of answers to other prompts in the microbatch, or 0 if that is less."""
    import torch

    from fnrecipe.data.judged import CHOSEN, REJECTED, UNRELATED
    from fnrecipe.models import preference
    from fnrecipe.models.answers import Answers, Judgement

    weights = config.desirable_weight, config.undesirable_weight

    def judge(answers: Answers) -> Judgement:
        ratios, desirable, others = answers.ratios, answers.verdicts == CHOSEN, answers.verdicts == UNRELATED
        divergence = (torch.where(others, ratios, 0.0).sum() / others.sum().clamp(min=1)).clamp(min=0)
        losses = preference.kto(ratios, desirable, divergence, beta=config.beta, weights=weights)
        return Judgement(losses, desirable | (answers.verdicts == REJECTED), config.beta * ratios)

    return judge


criterion = Criterion(KTOConfig, kto, reference=True, pairs=False)
