"""Gated feed-forward units."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gates: Tensor, values: Tensor) -> Tensor:
    """silu(gates) * values (Shazeer 2020, arXiv:2002.05202), of which only gates and values are kept for the gradient."""
    product: Tensor = _SwiGLU.apply(gates, values)  # type: ignore[no-untyped-call]
    return product


class _SwiGLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Any, values: Any) -> Any:
        return F.silu(gates) * values

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        gates, values = ctx.saved_tensors
        return _SiLUGradient.apply(gradient * values, gates), gradient * F.silu(gates)  # type: ignore[no-untyped-call]


class _SiLUGradient(torch.autograd.Function):
    """torch's kernel, which has no derivative, with that of its formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Any, x: Any) -> Any:
        return torch.ops.aten.silu_backward(gradient, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Any:
        gradient, x = ctx.saved_tensors
        share = torch.sigmoid(x)
        first = share * (1 + x * (1 - share))
        second = share * (1 - share) * (2 + x * (1 - 2 * share))
        return slope * first, slope * gradient * second
