"""What is minimised of each target beside its nats."""

from __future__ import annotations

from typing import TypeAlias

import attrs
from torch import Tensor

Terms: TypeAlias = dict[str, Tensor]
"""By the name of its rate, what each term adds to the nats of targets, float32."""


@attrs.frozen
class Objective:
    """Rates of terms that are added to nats; of one that is 0 there is no term.

    label_smoothing  ε, times the mean nats of all tokens less those of the target: then the target is so with the probability
                     1 - ε, and else any token (Szegedy et al. 2016, arXiv:1512.00567)
    z_loss           c, times the square of the logarithm of the softmax's denominator (PaLM, arXiv:2204.02311, section 5: 1e-4)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def names(self) -> list[str]:
        return [name for name, rate in attrs.asdict(self).items() if rate]

    def terms(self, nats: Tensor, log_total: Tensor, mean: Tensor | None) -> Terms:
        """The terms of targets, from the logarithm of the softmax's denominator and, for label smoothing, the mean logit."""
        terms = Terms()
        if self.label_smoothing:
            assert mean is not None
            terms["label_smoothing"] = self.label_smoothing * (log_total - mean - nats)
        if self.z_loss:
            terms["z_loss"] = self.z_loss * log_total.square()
        return terms
