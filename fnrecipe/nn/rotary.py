"""Rotary position embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fnrecipe.ops import opaque_clone


def rotary(
    positions: Tensor, width: int, theta: float, scaled: Callable[[Tensor], Tensor] | None = None, sharpened: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, 1, T, E], of rotary positions (Su et al. 2021, arXiv:2104.09864); positions [B, T].

    The first half of the sines is negative, as `rotate` needs it. `scaled`: of the frequencies [E / 2], in radians a position.
    Cosines and sines are multiplied by `sharpened`.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    frequencies = torch.exp(exponents * -math.log(theta))
    angles = positions[:, None, :, None].float() * (scaled(frequencies) if scaled else frequencies)
    cosines, sines = angles.cos(), angles.sin()
    if sharpened != 1:
        cosines, sines = cosines * sharpened, sines * sharpened
    # Inductor would compute cosines again in each kernel that rotates (33 of a step's 860 ms on a CPU, 1.2 of 33 on a GPU): it
    # takes them for cheap. What it cannot look into it cannot inline.
    return opaque_clone(torch.cat([cosines, cosines], -1)), opaque_clone(torch.cat([-sines, sines], -1))


def llama3_scaled(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Frequencies for a context that is `factor` times as long (Grattafiori et al. 2024, arXiv:2407.21783).

    What turns less than `low_freq_factor` times in the original context is divided by `factor`, what turns more than
    `high_freq_factor` times is kept; between the two the share of what is kept grows with the number of turns.
    """
    turns = original_max_position_embeddings / (2 * math.pi) * frequencies
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def yarn_scaled(frequencies: Tensor, *, theta: float, factor: float, length: int, fast: float, slow: float) -> Tensor:
    """Frequencies of base `theta` for a context that is `factor` times as long (Peng et al. 2023, arXiv:2309.00071).

    What turns less than `slow` times in the original context of `length` is divided by `factor`, what turns more than `fast`
    times is kept; between the two the share of what is kept falls with the number of the frequency.
    """
    size = len(frequencies)

    def number(turns: float) -> float:
        """Of the frequency that turns so often."""
        return size * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = max(math.floor(number(fast)), 0), min(math.ceil(number(slow)), 2 * size - 1)
    numbers = torch.arange(size, dtype=frequencies.dtype, device=frequencies.device)
    divided = ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    return divided * frequencies / factor + (1 - divided) * frequencies


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B, H, T, E] rotated by its positions; dimension i pairs with i + E/2, as in Hugging Face's weights."""
    return x * cosines.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sines.to(x.dtype)
