"""From logits to a token: pure functions of logits, what was said, and a uniform number that a key decides."""

from __future__ import annotations

import math
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from fnrecipe import random

Said: TypeAlias = Tensor | tuple[()]
"""The tokens that each row has, bool [B, V]; nothing where repetition costs nothing."""


@attrs.frozen(kw_only=True)
class Sampling:
    """How a token is chosen; the filters go in this order, and each leaves one token at least.

    repetition_penalty  logits of tokens that the row has are divided by it where positive, else multiplied; 1: as they are
                        (Keskar et al. 2019, arXiv:1909.05858)
    temperature         logits are divided by it; 0: the likeliest token, whatever the filters
    top_k               only so many of the likeliest tokens; None: all
    top_p               only the likeliest tokens that together have this probability at least; 1: all
                        (Holtzman et al. 2019, arXiv:1904.09751)
    min_p               only tokens with this share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082)
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


def choose(logits: Tensor, said: Said, uniform: Tensor, sampling: Sampling) -> Tensor:
    """A token of each row, int64 [B], of logits [B, V]; uniform float64 [B] decides, by inversion of the distribution.

    said: bool [B, V], the tokens that each row has. One number is drawn for a row,
    not one for each token of a vocabulary; with 53 bits it tells probabilities apart that float32 rounds to 0.
    """
    logits = penalised(logits.float(), said, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = filtered(logits / sampling.temperature, sampling).softmax(-1)
    below = chances.double().cumsum(-1)
    # The sum is 1 but for rounding, so numbers are drawn below the sum itself. The first token whose sum is above such a number
    # is one with a probability.
    whole = below[:, -1]
    drawn = torch.minimum(uniform * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(below, drawn[:, None], right=True)[:, 0]


def penalised(logits: Tensor, said: Said, penalty: float) -> Tensor:
    if isinstance(said, tuple):
        return logits
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V], -inf for the tokens that top-k, top-p or min-p leaves out; equal logits stay or go together."""
    least = torch.full_like(logits[:, :1], -torch.inf)
    top_k = logits.shape[-1] if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    if sampling.top_p < 1 or top_k < logits.shape[-1]:
        highest = logits.topk(top_k, -1).values
        least = highest[:, -1:]
        if sampling.top_p < 1:
            chances = highest.softmax(-1)
            kept = chances.cumsum(-1) - chances < sampling.top_p  # what is likelier does not suffice yet
            least = torch.where(kept, highest, torch.inf).amin(-1, keepdim=True)
    if sampling.min_p > 0:
        least = torch.maximum(least, logits.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return torch.where(logits >= least, logits, -torch.inf)


def uniforms(keys: Tensor, first: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B, count], of the positions from `first` [B] on, under the keys of rows [B, 2].

    A number depends on its row's key and position alone, and not on the other rows.
    """
    positions = first[:, None] + torch.arange(count, device=first.device)
    high, low = random.threefry(keys.T[:, :, None], positions >> 32, positions & 0xFFFFFFFF)
    return ((high >> 5).double() * 2.0**26 + (low >> 6)) * 2.0**-53
