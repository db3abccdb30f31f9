"""How rotary frequencies are scaled for contexts longer than those of pre-training; values, free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.errors import Problem


@frozen
class RopeScaling:
    """Llama 3.1's (Grattafiori et al. 2024, arXiv:2407.21783): long wavelengths are stretched, short ones kept, a ramp between.

    A frequency that turns less than `low_freq_factor` times in `original_max_position_embeddings` positions is divided by
    `factor`, one that turns more than `high_freq_factor` times is kept. The names are transformers'.
    """

    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    def conflicts(self) -> Iterator[Problem]:
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            yield Problem("high_freq_factor", f"a number above low_freq_factor = {low}", str(high))


@frozen
class Rope:
    """Rotary positions: their base and their scaling."""

    theta: float
    scaling: RopeScaling | None = None
