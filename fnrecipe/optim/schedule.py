"""Schedules: pure functions from the number of a step, counted from 1, to a value. They hold no state to restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""int64 [] -> float64 []"""


def cosine_annealing(peak: float, *, num_warmup_steps: int, num_steps: int, final_scale: float) -> Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `final_scale * peak` at step `num_steps`, and constant after.

    Step k of w warm-up steps has the rate peak * k / w: the first is above 0, step w (or step 1 without warm-up) is the
    peak. (Loshchilov & Hutter 2017, arXiv:1608.03983, one cycle.)
    """
    top = max(num_warmup_steps, 1)
    span = max(num_steps - top, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        warm = number / top
        progress = torch.clamp((number - top) / span, 0.0, 1.0)
        cosine = final_scale + (1 - final_scale) * 0.5 * (1 + torch.cos(math.pi * progress))
        return peak * torch.where(number < top, warm, cosine)

    return schedule


def wsd(peak: float, *, num_warmup_steps: int, num_decay_steps: int, num_steps: int, final_scale: float) -> Schedule:
    """Linear warm-up to `peak`, then `peak`, and in the last steps a line down to `final_scale * peak` at step `num_steps`.

    Warm-up is that of `cosine_annealing`; without decay the rate stays at its peak. (Hu et al. 2024, arXiv:2404.06395, and
    Haegele et al. 2024, arXiv:2405.18392, for the line.)
    """
    top = max(num_warmup_steps, 1)
    stable = max(num_steps - num_decay_steps, top)
    span = max(num_steps - stable, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        decayed = torch.clamp((number - stable) / span, 0.0, 1.0) if num_decay_steps else 0.0
        return peak * torch.clamp(number / top, max=1.0) * (1 - (1 - final_scale) * decayed)

    return schedule
