"""Rotary position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnrecipe.ops import opaque_clone


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, 1, T, E], of rotary positions (Su et al. 2021, arXiv:2104.09864); positions [B, T].

    The first half of the sines is negative, as `rotate` needs it.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() * torch.exp(exponents * -math.log(theta))
    cosines, sines = angles.cos(), angles.sin()
    # Inductor would compute cosines again in each kernel that rotates (33 of a step's 860 ms on a CPU, 1.2 of 33 on a GPU): it
    # takes them for cheap. What it cannot look into it cannot inline.
    return opaque_clone(torch.cat([cosines, cosines], -1)), opaque_clone(torch.cat([-sines, sines], -1))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B, H, T, E] rotated by its positions; dimension i pairs with i + E/2, as in Hugging Face's weights."""
    return x * cosines.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sines.to(x.dtype)
