"""Spikes: steps whose loss or gradient norm is far above those of the last steps that were made. Their updates are not made.

Of the last n values v, with the median m and MAD = median |v - m|, the limit is

    m + bound * max(MAD, |m| / 100)

Both are medians, which the spikes that were let through before do not move; the hundredth is for values that hardly vary. Only
what is above is a spike. Only steps that are made are remembered, so a series of spikes is one until it ends: the run must end
before (`trainer.max_skipped_steps`). Nothing is a spike before n steps were made.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import tree

_LEAST_SPREAD = 0.01


@attrs.frozen
class SpikeGuard:
    """How many steps are remembered, and the bound: how many MADs above the median a spike begins."""

    window: int = 128
    bound: float = 10.0


@tree.node
@attrs.frozen(eq=False)
class SpikeWindow:
    """Mean losses and gradient norms of the last steps that were made, float64 [window] each; how many were, int64 []."""

    losses: Tensor
    norms: Tensor
    count: Tensor


def init_window(guard: SpikeGuard, device: torch.device) -> SpikeWindow:
    losses, norms = (torch.zeros(guard.window, dtype=torch.float64, device=device) for _ in range(2))
    return SpikeWindow(losses, norms, torch.zeros((), dtype=torch.int64, device=device))


def limits(guard: SpikeGuard, window: SpikeWindow) -> tuple[Tensor, Tensor]:
    """What loss and norm of a step may be at most, float64 [] each; infinite until the window is full."""
    full = window.count >= guard.window
    loss, norm = (torch.where(full, _limit(guard, values), torch.inf) for values in (window.losses, window.norms))
    return loss, norm


def update_window(window: SpikeWindow, loss: Tensor, norm: Tensor, made: Tensor) -> SpikeWindow:
    """The window behind a step of this loss and norm, if that was `made`, bool []; else as it was."""
    size = window.losses.shape[0]
    here = made & (torch.arange(size, device=window.count.device) == window.count % size)
    losses = torch.where(here, loss.double(), window.losses)
    norms = torch.where(here, norm.double(), window.norms)
    return SpikeWindow(losses, norms, torch.where(made, window.count + 1, window.count))


def _limit(guard: SpikeGuard, values: Tensor) -> Tensor:
    median = _median(values)
    return median + guard.bound * torch.maximum(_median((values - median).abs()), _LEAST_SPREAD * median.abs())


def _median(values: Tensor) -> Tensor:
    """The middle value; of an even number the lower one of the two."""
    middle: Tensor = torch.sort(values).values[(len(values) - 1) // 2]
    return middle
