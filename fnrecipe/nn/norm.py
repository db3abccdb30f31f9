"""Norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrecipe.nn.linear import Weight
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Shard


def rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467); x [..., D], weight [D].

    Computed in float32 at least, and rounded to the dtype of x. For its gradient it keeps x and a number a row.
    """
    scale = tensor_parallel.shared(weight) if isinstance(weight, Shard) else weight
    normed: Tensor = _RMSNorm.apply(x, scale, eps)[0]  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any, weight: Any, eps: float) -> Any:
        wide = _wide(x)
        root = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
        return (wide * root * weight).to(x.dtype), root

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Any, of_root: Any) -> Any:
        """`of_root` is there where this gradient is differentiated in turn."""
        x, weight, root = ctx.saved_tensors
        normed, of_x, of_weight = _wide(x) * root, None, None
        if gradient is not None:
            slope = _wide(gradient) * weight
            along = (slope * normed).sum(-1, keepdim=True) / x.shape[-1]
            of_x, of_weight = (slope - normed * along) * root, (_wide(gradient) * normed).sum_to_size(weight.shape)
        if of_root is not None:
            through_root = -of_root * normed * root * root / x.shape[-1]
            of_x = through_root if of_x is None else of_x + through_root
        return None if of_x is None else of_x.to(x.dtype), of_weight, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
