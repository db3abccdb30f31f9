"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.nn.linear import Weight
from fnrecipe.ops import Context
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Shard


def rms_norm(x: Tensor, weight: Weight, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467); x [..., D], weight [D].

    `offset` is added to the weight. Computed in float32 at least, and rounded to the dtype of x. Saves x and one scalar a row
    for the backward pass. Of a weight that is sharded along its dimension, x is the slice of a longer axis.
    """
    if isinstance(weight, Shard) and weight.dim == 0:
        return _sharded_rms_norm(x, weight, eps)
    scale = tensor_parallel.shared(weight) if isinstance(weight, Shard) else weight
    scale = _wide(scale) + offset if offset else scale
    normed: Tensor = _RMSNorm.apply(x, scale, eps)[0]  # type: ignore[no-untyped-call]
    return normed


def _sharded_rms_norm(x: Tensor, weight: Shard, eps: float) -> Tensor:
    wide = _wide(x)
    squares = tensor_parallel.sum_of_ranks((wide * wide).sum(-1, keepdim=True), weight.axis)
    root = torch.rsqrt(squares / (x.shape[-1] * weight.axis.size) + eps)
    normed: Tensor = (wide * root * weight.local).to(x.dtype)
    return normed


def layer_norm(x: Tensor, weight: Weight, bias: Weight, eps: float) -> Tensor:
    """Layer norm over the last axis (Ba et al. 2016, arXiv:1607.06450); x [..., D], weight and bias [D].

    Computed in float32 at least, and rounded to the dtype of x.
    """
    wide = _wide(x)
    scale, shift = (tensor_parallel.shared(y) if isinstance(y, Shard) else y for y in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], scale.to(wide.dtype), shift.to(wide.dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    # By autograd, several float32 tensors of the shape of x would be saved. The reciprocal root is an output, so that a second
    # derivative reaches it: then `of_root` is its gradient.

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = _wide(x)
        root = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
        return (wide * root * weight).to(x.dtype), root

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx: Context, gradient: Tensor | None, of_root: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        normed = _wide(x) * root
        of_x: Tensor | None = None
        of_weight: Tensor | None = None
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
