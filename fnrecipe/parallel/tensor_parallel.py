"""Tensor parallelism: embedding, cross entropy and collectives for weights that are sharded along the mesh's tensor axis.

(Shoeybi et al. 2019, arXiv:1909.08053; between layers, activations are sharded by position: Korthikanti et al. 2022,
arXiv:2205.05198.) A sum over ranks adds other partial sums than one rank would: results are equal within rounding only.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.ops import Context
from fnrecipe.parallel.collectives import all_gather, all_reduce, c10d, reduce_scatter, with_transpose
from fnrecipe.parallel.mesh import Axis, Shard

Pair: TypeAlias = tuple[Tensor, Tensor]


def all_positions(x: Tensor, axis: Axis) -> Tensor:
    """All-gather of x [B, T / axis.size, D] along positions: [B, T, D]; its transpose is a reduce-scatter."""
    return with_transpose(lambda xs: all_gather(xs, [1], axis), lambda xs: reduce_scatter(xs, [1], axis))([x])[0]


def own_positions(x: Tensor, axis: Axis) -> Tensor:
    """This rank's positions [B, T / axis.size, …] of what all ranks have of all positions."""
    return x.chunk(axis.size, 1)[axis.index]


def sum_of_positions(x: Tensor, axis: Axis) -> Tensor:
    """Reduce-scatter of x [B, T, D] along positions: [B, T / axis.size, D]; its transpose is an all-gather."""
    return with_transpose(lambda xs: reduce_scatter(xs, [1], axis), lambda xs: all_gather(xs, [1], axis))([x])[0]


def sum_of_ranks(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce of what each rank has computed of its own heads or units; so is its transpose."""
    return with_transpose(*[lambda xs: all_reduce(list(xs), axis)] * 2)([x])[0]


def shared(weight: Shard) -> Tensor:
    """A replicated weight that each rank applies to its own positions: its gradient is all-reduced."""
    axis = weight.axis
    return with_transpose(lambda xs: [x.view_as(x) for x in xs], lambda xs: all_reduce(list(xs), axis))([weight.local])[0]


def embedding(tokens: Tensor, weight: Shard) -> Tensor:
    """This rank's positions [B, T / axis.size, D] of the embeddings of tokens [B, T], the vocabulary being sharded."""
    rows, is_local = _local(tokens, weight.local.shape[0], weight.axis)
    return sum_of_positions(F.embedding(rows, weight.local) * is_local[..., None], weight.axis)


def cross_entropy(logits: Shard, targets: Tensor) -> Tensor:
    """Nats, float32 [B, T], of targets [B, T] under logits [B, T, V], whose vocabulary is sharded."""
    return _cross_entropy(logits.axis, False).apply(logits.local.float(), targets)[0]  # type: ignore[no-any-return, no-untyped-call]


def statistics(logits: Shard, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the logarithm of the softmax's denominator, and the mean of all logits, float32 [B, T] each."""
    nats, _, *others = _cross_entropy(logits.axis, True).apply(logits.local.float(), targets)  # type: ignore[no-untyped-call]
    log_total, mean = others
    return nats, log_total, mean


def all_logits(logits: Shard) -> Tensor:
    """Logits [B, T, V] of the full vocabulary."""
    return all_gather([logits.local], [logits.local.ndim - 1], logits.axis)[0]


def _cross_entropy(axis: Axis, with_others: bool) -> type[torch.autograd.Function]:
    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            largest = c10d.wait_tensor(c10d.all_reduce(logits.amax(-1), "max", axis.group))
            powers = torch.exp(logits - largest[..., None])
            rows, is_local = _local(targets, logits.shape[-1], axis)
            chosen = logits.gather(-1, rows[..., None])[..., 0] * is_local
            sums = [logits.sum(-1)] if with_others else []
            total, chosen, *sums = all_reduce([powers.sum(-1), chosen, *sums], axis)
            log_total = torch.log(total) + largest
            others = [log_total, *(each / (axis.size * logits.shape[-1]) for each in sums)] if with_others else []
            return log_total - chosen, powers / total[..., None], *others

        @staticmethod
        def setup_context(ctx: Context, inputs: Pair, output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(inputs[1], output[1])

        @staticmethod
        def backward(ctx: Context, gradient: Tensor, _: Tensor, *others: Tensor) -> tuple[Tensor, None]:
            targets, probabilities = ctx.saved_tensors
            rows, is_local = _local(targets, probabilities.shape[-1], axis)
            chosen = torch.zeros_like(probabilities).scatter(-1, rows[..., None], is_local[..., None].to(probabilities.dtype))
            slope = gradient[..., None] * (probabilities - chosen)
            if others:
                of_log_total, of_mean = others
                size = axis.size * probabilities.shape[-1]
                slope = slope + of_log_total[..., None] * probabilities + of_mean[..., None] / size
            return slope, None

    return CrossEntropy


def _local(ids: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Ids relative to this rank's first one, 0 for those of other ranks; and which ids are this rank's."""
    local = ids - axis.index * size
    is_local = (local >= 0) & (local < size)
    return torch.where(is_local, local, 0), is_local
