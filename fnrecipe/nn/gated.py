"""Gated feed-forward units."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.ops import Context

Pair: TypeAlias = tuple[Tensor, Tensor]


def swiglu(gates: Tensor, values: Tensor) -> Tensor:
    """silu(gates) * values (Shazeer 2020, arXiv:2002.05202); only gates and values are saved for the backward pass."""
    product: Tensor = _SwiGLU.apply(gates, values)  # type: ignore[no-untyped-call]
    return product


def geglu(gates: Tensor, values: Tensor) -> Tensor:
    """gelu(gates) * values (Shazeer 2020, arXiv:2002.05202), with the approximation of GELU by tanh."""
    return F.gelu(gates, approximate="tanh") * values


class _SwiGLU(torch.autograd.Function):
    generate_vmap_rule = True

    # `torch.func.grad` always asks for a graph of the gradient, so autograd takes the differentiable formula of silu's
    # backward: seven elementwise operations, and as many saved tensors, instead of one kernel.

    @staticmethod
    def forward(gates: Tensor, values: Tensor) -> Tensor:
        return F.silu(gates) * values

    @staticmethod
    def setup_context(ctx: Context, inputs: Pair, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Pair:
        gates, values = ctx.saved_tensors
        return _SiLUGradient.apply(gradient * values, gates), gradient * F.silu(gates)  # type: ignore[no-untyped-call]


class _SiLUGradient(torch.autograd.Function):
    """torch's `silu_backward` kernel, for which torch has no derivative, with the derivative of its formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten.silu_backward(gradient, x)
        return product

    @staticmethod
    def setup_context(ctx: Context, inputs: Pair, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Context, slope: Tensor) -> Pair:
        gradient, x = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        first = sigmoid * (1 + x * (1 - sigmoid))
        second = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
        return slope * first, slope * gradient * second
