"""Linear layers: embeddings, projections, and the head with its cross entropy."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fnrecipe.nn import adapted, linear_cross_entropy
from fnrecipe.nn.adapted import Adapted
from fnrecipe.nn.linear_cross_entropy import DeferredLogits, chunk_size, softcapped
from fnrecipe.nn.policy import Chunk
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Shard

Weight: TypeAlias = Tensor | Shard
Logits: TypeAlias = Tensor | Shard | DeferredLogits


def embedding(tokens: Tensor, weight: Weight) -> Tensor:
    """The rows of weight [V, D] at tokens [B, T]: [B, T, D]."""
    if isinstance(weight, Shard):
        return tensor_parallel.embedding(tokens, weight)
    return F.embedding(tokens, weight)


def entered(x: Tensor, weight: Weight | Adapted) -> Tensor:
    """All positions of x, for products with weights that are sharded like `weight`."""
    base = weight.base if isinstance(weight, Adapted) else weight
    return tensor_parallel.all_positions(x, base.axis) if isinstance(base, Shard) else x


def linear(x: Tensor, weight: Weight | Adapted, bias: Weight | None = None) -> Tensor:
    """x [..., D] times the transpose of weight [F, D], plus bias [F], both cast to the dtype of x: [..., F].

    The bias of a weight that is sharded along its first dimension is sharded too; of one along its second, it is shared.
    """
    if isinstance(weight, Tensor):
        assert not isinstance(bias, Shard)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    base = weight.base if isinstance(weight, Adapted) else weight
    if isinstance(weight, Adapted):
        gain, product = adapted.gain(weight), adapted.product(x, weight)
    else:
        gain, product = None, F.linear(x, weight.local.to(x.dtype))
    if isinstance(base, Shard) and base.dim != 0:
        product = tensor_parallel.sum_of_positions(product, base.axis)
    product = product if gain is None else product * gain.to(x.dtype)
    return product if bias is None else product + adapted.own(bias).to(x.dtype)


def logits(x: Tensor, weight: Weight, chunk: Chunk = None, softcap: float | None = None) -> Logits:
    """x [B, T, D] times the head [V, D]: [B, T, V], sharded like the head; deferred if `chunk` is given.

    With a `softcap`, softcap · tanh(logit / softcap) of each.
    """
    if chunk is not None and not isinstance(weight, Shard):
        return DeferredLogits(x, weight, chunk_size(x, weight) if chunk == "auto" else chunk, softcap)
    product = softcapped(linear(entered(x, weight), weight), softcap)
    return Shard(product, -1, weight.axis) if isinstance(weight, Shard) else product


def all_logits(logits: Logits) -> Tensor:
    """Unsharded logits [B, T, V]."""
    if isinstance(logits, DeferredLogits):
        return softcapped(linear(logits.x, logits.weight), logits.softcap)
    return tensor_parallel.all_logits(logits) if isinstance(logits, Shard) else logits


def cross_entropy(logits: Logits, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the nats of targets [B, T] where mask [B, T] holds, float32 [], and all nats, float32 [B, T], detached."""
    if isinstance(logits, DeferredLogits):
        return linear_cross_entropy.cross_entropy(logits, targets, mask)
    if isinstance(logits, Shard):
        nats = tensor_parallel.cross_entropy(logits, targets)
    else:
        nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)
    return (nats * mask).sum(), nats.detach()
