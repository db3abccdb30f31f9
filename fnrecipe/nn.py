"""The functions that models are made of.

Shapes: B rows, T positions, D model width, H heads, G key-value heads, E head width, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467); x [..., D], weight [D]."""
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x * torch.rsqrt(mean_square + eps) * weight


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, 1, T, E], of rotary positions (Su et al. 2021, arXiv:2104.09864); positions [B, T].

    The first half of the sines is negative, as `rotate` needs it.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() * theta**-exponents
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B, H, T, E] turned by its positions; dimension i pairs with i + E/2, as in Hugging Face's weights."""
    return x * cosines + x.roll(x.shape[-1] // 2, -1) * sines


def segment_mask(segments: Tensor) -> Tensor:
    """Attention bias, float32 [B, 1, T, T]: 0 to earlier positions of the same segment, -inf elsewhere; segments [B, T]."""
    length = segments.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
    return torch.where(visible, 0.0, -torch.inf)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with grouped key-value heads; query [B, H, T, E], key and value [B, G, T, E], mask [B, 1, T, T]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gated feed-forward (Shazeer 2020, arXiv:2002.05202); x [..., D], gate and up [F, D], down [D, F].

    `silu` is written out: `torch.func` differentiates torch's own by a formula of seven passes over memory, this by four.
    """
    gates = F.linear(x, gate)
    return F.linear(gates * torch.sigmoid(gates) * F.linear(x, up), down)
