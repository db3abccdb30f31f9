"""Schedules: pure functions from the number of a step, counted from 1, to a value. They hold no state to restart.

All begin with linear warm-up, unless they say otherwise: step k of w warm-up steps has the rate `peak * k / w`. The first is
above 0, step w (or step 1 without warm-up) is the peak. Those with an end have their final rate at step `num_steps`, and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""int64 [] -> float64 []"""

Scheduled: TypeAlias = float | Schedule
"""A weight decay, or a momentum: one number, or one for each step."""


@attrs.frozen
class Schedules:
    """What an optimizer changes over steps.

    rate      the greatest learning rate -> its schedule; the schedules themselves, called with it, give the same
    decay     the greatest weight decay -> it at each step
    momentum  the greatest momentum, or first beta -> it at each step
    """

    rate: Callable[[float], Schedule]
    decay: Callable[[float], Scheduled] = lambda number: number
    momentum: Callable[[float], Scheduled] = lambda number: number

    def __call__(self, peak: float) -> Schedule:
        return self.rate(peak)

    def scaled(self, factor: float) -> Schedules:
        """These, with all learning rates times the factor."""

        def rate(peak: float) -> Schedule:
            schedule = self.rate(peak)
            return lambda step: schedule(step) * factor

        return self if factor == 1 else attrs.evolve(self, rate=rate)


Tail: TypeAlias = Literal["linear", "1-sqrt", "cosine"]
_TAILS: dict[Tail, Callable[[Tensor], Tensor]] = {
    "linear": lambda decayed: decayed,
    "1-sqrt": torch.sqrt,
    "cosine": lambda decayed: 0.5 * (1 - torch.cos(math.pi * decayed)),
}
"""What share of the way down is behind after each share of the steps of a decay."""


def constant(peak: float, *, num_warmup_steps: int = 0, start_lr: float = 0.0) -> Schedule:
    """Warm-up from `start_lr`, then `peak`."""
    warmup = num_warmup_steps
    return polynomial_decay(peak, num_warmup_steps=warmup, num_steps=warmup, start_lr=start_lr, final_lr=peak)


def linear(peak: float, *, num_warmup_steps: int, num_steps: int, final_scale: float = 0.0) -> Schedule:
    """Warm-up, then a line down to `final_scale * peak`. (Defazio et al. 2023, arXiv:2310.07831, for the line to 0.)"""
    return polynomial_decay(peak, num_warmup_steps=num_warmup_steps, num_steps=num_steps, final_lr=final_scale * peak)


def polynomial_decay(
    peak: float,
    *,
    num_warmup_steps: int,
    num_steps: int,
    power: float = 1.0,
    start_lr: float = 0.0,
    final_lr: float = 0.0,
) -> Schedule:
    """Warm-up from `start_lr`, then down to `final_lr` as a power of the share of the steps that are left."""
    top = max(num_warmup_steps, 1)
    span = max(num_steps - top, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        left = 1 - torch.clamp((number - top) / span, 0.0, 1.0)
        return torch.where(number < top, _warmed(peak, number, top, start_lr), final_lr + (peak - final_lr) * left**power)

    return schedule


def exponential(peak: float, *, start_scale: float, final_scale: float, first_step: int, last_step: int) -> Schedule:
    """`start_scale * peak` up to `first_step`, `final_scale * peak` from `last_step` on, and a power between them."""

    def schedule(step: Tensor) -> Tensor:
        passed = torch.clamp((step.to(torch.float64) - first_step) / (last_step - first_step), 0.0, 1.0)
        return peak * start_scale * torch.pow(final_scale / start_scale, passed)

    return schedule


def noam(peak: float, *, num_warmup_steps: int) -> Schedule:
    """`peak * min(k ** -0.5, k * w ** -1.5)` at step k: w steps of warm-up to `peak / sqrt(w)`, and the inverse square root.

    (Vaswani et al. 2017, arXiv:1706.03762, whose `peak` is the width ** -0.5. Without warm-up the first step has `peak`.)
    """
    top = max(num_warmup_steps, 1)
    return inverse_sqrt(peak / math.sqrt(top), num_warmup_steps=top, timescale=top)


def inverse_sqrt(peak: float, *, num_warmup_steps: int, timescale: int, start_lr: float = 0.0) -> Schedule:
    """Warm-up from `start_lr`, then `peak / sqrt(1 + n / timescale)`, n steps after the peak.

    (Raffel et al. 2020, arXiv:1910.10683, and Zhai et al. 2022, arXiv:2106.04560, for the time scale.)
    """
    top = max(num_warmup_steps, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        decayed = peak * torch.rsqrt(1 + torch.clamp(number - top, min=0.0) / timescale)
        return torch.where(number < top, _warmed(peak, number, top, start_lr), decayed)

    return schedule


def tri_stage(
    peak: float, *, num_steps: int, stage_ratio: tuple[float, float, float], start_scale: float, final_scale: float
) -> Schedule:
    """A line from `start_scale * peak` up to `peak`, `peak`, and an exponential down to `final_scale * peak`.

    `stage_ratio` has the shares of the three stages in `num_steps`; each ends at a whole step, the last one at `num_steps`. A
    stage without steps is left out: without the last one the rate stays at its peak. (Park et al. 2019, arXiv:1904.08779.)
    """
    top = round(stage_ratio[0] * num_steps)
    stable = round((stage_ratio[0] + stage_ratio[1]) * num_steps)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        decayed = torch.clamp((number - stable) / max(num_steps - stable, 1), 0.0, 1.0) if stable < num_steps else 0 * number
        warm = _warmed(peak, number, max(top, 1), start_scale * peak)
        return torch.where(number < top, warm, peak * final_scale**decayed)

    return schedule


def cosine_annealing(peak: float, *, num_warmup_steps: int, num_steps: int, final_scale: float) -> Schedule:
    """Warm-up, then half a cosine down to `final_scale * peak`. (Loshchilov & Hutter 2017, arXiv:1608.03983, one cycle.)"""
    top = max(num_warmup_steps, 1)
    span = max(num_steps - top, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        warm = number / top
        progress = torch.clamp((number - top) / span, 0.0, 1.0)
        cosine = final_scale + (1 - final_scale) * 0.5 * (1 + torch.cos(math.pi * progress))
        return peak * torch.where(number < top, warm, cosine)

    return schedule


def cosine_with_restarts(
    peak: float, *, num_warmup_steps: int, cycle_len: int, cycle_mul: float = 1.0, lr_mul: float = 1.0, final_scale: float
) -> Schedule:
    """Warm-up, then cycles, each half a cosine from its peak down to `final_scale` times that.

    The first cycle has `cycle_len` steps behind the peak, each other one `cycle_mul` >= 1 times those of the one before it, and
    `lr_mul` times its rates. A cycle's last step has its final rate, and so has the last step of a training that ends with it:
    the peak of the next one is left out. (Loshchilov & Hutter 2017, arXiv:1608.03983.)
    """
    top = max(num_warmup_steps, 1)

    def begin(cycle: Tensor) -> Tensor:
        """Steps before a cycle, behind the peak."""
        return cycle_len * (cycle if cycle_mul == 1 else (cycle_mul**cycle - 1) / (cycle_mul - 1))

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        passed = torch.clamp(number - top, min=0.0)
        if cycle_mul == 1:
            cycle = torch.ceil(passed / cycle_len) - 1
        else:  # the logarithm may be rounded to the other side of a whole number, which the comparisons mend
            cycle = torch.round(torch.log1p(passed * (cycle_mul - 1) / cycle_len) / math.log(cycle_mul))
            cycle = cycle - torch.where(begin(cycle) >= passed, 1.0, 0.0)
        cycle = torch.clamp(cycle, min=0.0)
        progress = (passed - begin(cycle)) / (begin(cycle + 1) - begin(cycle))
        cosine = final_scale + (1 - final_scale) * 0.5 * (1 + torch.cos(math.pi * progress))
        return peak * torch.where(number < top, number / top, lr_mul**cycle * cosine)

    return schedule


def wsd(
    peak: float,
    *,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_steps: int,
    final_scale: float,
    decay_type: Tail = "linear",
    start_lr: float = 0.0,
) -> Schedule:
    """Warm-up from `start_lr`, then `peak`, and in the last steps a line, 1 - sqrt or half a cosine to `final_scale * peak`.

    Without decay the rate stays at its peak: a longer training has the same rates before its decay. (Hu et al. 2024,
    arXiv:2404.06395, and Haegele et al. 2024, arXiv:2405.18392, for the line and for 1 - sqrt.)
    """
    top = max(num_warmup_steps, 1)
    stable = max(num_steps - num_decay_steps, top)
    span = max(num_steps - stable, 1)

    def schedule(step: Tensor) -> Tensor:
        number = step.to(torch.float64)
        decayed = _TAILS[decay_type](torch.clamp((number - stable) / span, 0.0, 1.0)) if num_decay_steps else 0.0
        return _warmed(peak, number.clamp(max=top), top, start_lr) * (1 - (1 - final_scale) * decayed)

    return schedule


def _warmed(peak: float, number: Tensor, top: int, start: float) -> Tensor:
    """Linear warm-up from `start` at step 0, which is none, to `peak` at step `top`."""
    return start + (peak - start) * (number / top)
