"""Linear layers: embeddings, projections, and the head with its cross entropy."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fnrecipe.nn import linear_cross_entropy
from fnrecipe.nn.linear_cross_entropy import Head
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Part

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
        return linear_cross_entropy.cross_entropy(logits, targets, mask)
    if isinstance(logits, Part):
        nats = tensor_parallel.cross_entropy(logits, targets)
    else:
        nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)
    return (nats * mask).sum(), nats.detach()
