"""Rotary positions, and how their frequencies are scaled for contexts longer than those of pre-training. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from attrs import frozen

from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.errors import Problem


@frozen
class Llama3Scaling:
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
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as Llama 3.1's, with a ramp over dimensions, and scores that are sharpened.

    A frequency that turns less than `beta_slow` times in `original_max_position_embeddings` positions is divided by `factor`,
    one that turns more than `beta_fast` times is kept. Rotated queries and keys are multiplied by `attention_factor`; null:
    1 + ln(factor) / 10. The names are transformers'.
    """

    factor: Positive = 8.0
    original_max_position_embeddings: PositiveInt = 8192
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0

    def conflicts(self) -> Iterator[Problem]:
        slow, fast = self.beta_slow, self.beta_fast
        if fast <= slow:
            yield Problem("beta_fast", f"a number above beta_slow = {slow}", str(fast))


RopeScaling: TypeAlias = Llama3Scaling | YarnScaling

SCALINGS: dict[str, type[RopeScaling]] = {"llama3": Llama3Scaling, "yarn": YarnScaling}
"""By transformers' name of the type."""


@frozen
class Rope:
    """Rotary positions: their base and their scaling."""

    theta: float
    scaling: RopeScaling | None = None
