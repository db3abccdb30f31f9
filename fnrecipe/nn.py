"""The functions that models are made of.

Shapes: B rows, T positions, D model width, H heads, G key-value heads, E head width, F feed-forward width, V vocabulary.

Weights may be parts along the tensor axis of a mesh (`fnrecipe.tensor_parallel`). Then x is a slice of the positions between
layers, `entered` before a product with weights cut along their first dimension, and a slice again behind a product with
weights cut along their second; H, G, F and V are those of the part.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import head, tensor_parallel
from fnrecipe.head import Head
from fnrecipe.parts import Part

Weight: TypeAlias = Tensor | Part
Logits: TypeAlias = Tensor | Part | Head


def embedding(tokens: Tensor, weight: Weight) -> Tensor:
    """The rows of weight [V, D] that tokens [B, T] name: [B, T, D]."""
    if isinstance(weight, Part):
        return tensor_parallel.embedding(tokens, weight)
    return F.embedding(tokens, weight)


def entered(x: Tensor, weight: Weight) -> Tensor:
    """All positions of x, for products with weights that are cut like `weight`."""
    return tensor_parallel.all_positions(x, weight.axis) if isinstance(weight, Part) else x


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., D] times weight [F, D], transposed, in the dtype of x: [..., F]."""
    if not isinstance(weight, Part):
        return F.linear(x, weight.to(x.dtype))
    product = F.linear(x, weight.local.to(x.dtype))
    return product if weight.dim == 0 else tensor_parallel.sum_of_positions(product, weight.axis)


def logits(x: Tensor, weight: Weight, chunk: int | None = None) -> Logits:
    """x [B, T, D] times the head [V, D]: [B, T, V], cut like the head; a product that is not made yet if `chunk` is given."""
    if chunk is not None and not isinstance(weight, Part):
        return Head(x, weight, chunk)
    product = linear(entered(x, weight), weight)
    return Part(product, -1, weight.axis) if isinstance(weight, Part) else product


def all_logits(logits: Logits) -> Tensor:
    """Whole logits [B, T, V]."""
    if isinstance(logits, Head):
        return linear(logits.x, logits.weight)
    return tensor_parallel.all_logits(logits) if isinstance(logits, Part) else logits


def cross_entropy(logits: Logits, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the nats of targets [B, T] where mask [B, T] holds, float32 [], and the nats of all, float32 [B, T]."""
    if isinstance(logits, Head):
        return head.cross_entropy(logits, targets, mask)
    if isinstance(logits, Part):
        nats = tensor_parallel.cross_entropy(logits, targets)
    else:
        nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)
    return (nats * mask).sum(), nats.detach()


def rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467); x [..., D], weight [D].

    Computed in float32 at least, and rounded to the dtype of x. For its gradient it keeps x and a number a row.
    """
    scale = tensor_parallel.shared(weight) if isinstance(weight, Part) else weight
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


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, 1, T, E], of rotary positions (Su et al. 2021, arXiv:2104.09864); positions [B, T].

    The first half of the sines is negative, as `rotate` needs it.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    # Inductor keeps what an `exp` is in, and would compute cosines of powers anew for each head.
    angles = positions[:, None, :, None].float() * torch.exp(exponents * -math.log(theta))
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B, H, T, E] turned by its positions; dimension i pairs with i + E/2, as in Hugging Face's weights."""
    return x * cosines.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sines.to(x.dtype)


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
