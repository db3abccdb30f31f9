"""Linear layers: embeddings, projections, and the head with its cross entropy."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import ops
from fnrecipe.nn import adapted, linear_cross_entropy
from fnrecipe.nn.adapted import Adapted
from fnrecipe.nn.linear_cross_entropy import DeferredLogits, chunk_size, softcapped
from fnrecipe.nn.objective import Objective, Terms
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


def own_positions(x: Tensor, weight: Weight) -> Tensor:
    """Of x [B, T, …] the positions that activations between layers have here, whose weights are sharded like `weight`."""
    return tensor_parallel.own_positions(x, weight.axis) if isinstance(weight, Shard) else x


def linear(x: Tensor, weight: Weight | Adapted, bias: Weight | None = None) -> Tensor:
    """x [..., D] times the transpose of weight [F, D], plus bias [F], both cast to the dtype of x: [..., F].

    The bias of a weight that is sharded along its first dimension is sharded too; of one along its second, it is shared.
    """
    if isinstance(weight, Tensor):
        assert not isinstance(bias, Shard)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        # A graph's products are left to the passes.
        if torch.is_inference_mode_enabled() and type(x) is Tensor and ops.is_large_product(x, weight):
            return ops.linear_by_onednn(x, weight, bias)
        return F.linear(x, weight, bias)
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


def cross_entropy(
    logits: Logits, targets: Tensor, weights: Tensor, objective: Objective = Objective()
) -> tuple[Tensor, Tensor, Terms]:
    """What is minimised, float32 []: the weighted sum of nats and terms of targets, int64 [B, T]; then these, detached.

    weights [B, T]: a mask, or float32. Nats and terms are float32 [B, T].
    """
    if isinstance(logits, DeferredLogits):
        return linear_cross_entropy.cross_entropy(logits, targets, weights, objective)
    nats, terms = _nats_and_terms(logits, targets, objective)
    total = (sum(terms.values(), nats) * weights).sum()
    return total, nats.detach(), {name: term.detach() for name, term in terms.items()}


def _nats_and_terms(logits: Tensor | Shard, targets: Tensor, objective: Objective) -> tuple[Tensor, Terms]:
    if isinstance(logits, Shard):
        if not objective.names:
            return tensor_parallel.cross_entropy(logits, targets), {}
        nats, log_total, mean = tensor_parallel.statistics(logits, targets)
        return nats, objective.terms(nats, log_total, mean)
    flat = logits.flatten(0, -2).float()
    nats = F.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)
    if not objective.names:
        return nats, {}
    log_total, mean = (values.view(targets.shape) for values in (flat.logsumexp(-1), flat.mean(-1)))
    return nats, objective.terms(nats, log_total, mean)
