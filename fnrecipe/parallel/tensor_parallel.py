"""Tensor parallelism: products with weights that are cut over the tensor axis of a mesh, and what goes with them.

(Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198, for the slices of positions between layers.)
Sums over ranks are of other summands than one rank would add up: results are equal within rounding, not bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.parallel.collectives import all_gather, all_reduce, c10d, reduce_scatter, with_transpose
from fnrecipe.parallel.mesh import Axis, Shard


def all_positions(x: Tensor, axis: Axis) -> Tensor:
    """x [B, T / axis.size, D] of all ranks: [B, T, D]; its transpose sums over the ranks and cuts."""
    return with_transpose(lambda xs: all_gather(xs, [1], axis), lambda xs: reduce_scatter(xs, [1], axis))([x])[0]


def sum_of_positions(x: Tensor, axis: Axis) -> Tensor:
    """This rank's positions [B, T / axis.size, D] of the sum of all ranks' x [B, T, D]; its transpose gathers."""
    return with_transpose(lambda xs: reduce_scatter(xs, [1], axis), lambda xs: all_gather(xs, [1], axis))([x])[0]


def shared(weight: Shard) -> Tensor:
    """A weight that all ranks have and use on positions of their own: its gradient is the sum of theirs."""
    axis = weight.axis
    return with_transpose(lambda xs: [x.view_as(x) for x in xs], lambda xs: all_reduce(list(xs), axis))([weight.local])[0]


def embedding(tokens: Tensor, weight: Shard) -> Tensor:
    """This rank's positions [B, T / axis.size, D] of the rows that tokens [B, T] name, of a vocabulary cut over the ranks."""
    rows, mine = _local(tokens, weight.local.shape[0], weight.axis)
    return sum_of_positions(F.embedding(rows, weight.local) * mine[..., None], weight.axis)


def cross_entropy(logits: Shard, targets: Tensor) -> Tensor:
    """Nats, float32 [B, T], of targets [B, T] under logits [B, T, V], whose vocabulary is cut over the ranks."""
    return _cross_entropy(logits.axis).apply(logits.local.float(), targets)[0]  # type: ignore[no-any-return, no-untyped-call]


def all_logits(logits: Shard) -> Tensor:
    """Logits [B, T, V] of the whole vocabulary."""
    return all_gather([logits.local], [logits.local.ndim - 1], logits.axis)[0]


def _cross_entropy(axis: Axis) -> type[torch.autograd.Function]:
    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(logits: Any, targets: Any) -> Any:
            largest = c10d.wait_tensor(c10d.all_reduce(logits.amax(-1), "max", axis.group))
            powers = torch.exp(logits - largest[..., None])
            rows, mine = _local(targets, logits.shape[-1], axis)
            chosen = logits.gather(-1, rows[..., None])[..., 0] * mine
            total, chosen = all_reduce([powers.sum(-1), chosen], axis)
            return torch.log(total) + largest - chosen, powers / total[..., None]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(inputs[1], output[1])

        @staticmethod
        def backward(ctx: Any, gradient: Any, _: Any) -> Any:
            targets, probabilities = ctx.saved_tensors
            rows, mine = _local(targets, probabilities.shape[-1], axis)
            chosen = torch.zeros_like(probabilities).scatter(-1, rows[..., None], mine[..., None].to(probabilities.dtype))
            return gradient[..., None] * (probabilities - chosen), None

    return CrossEntropy


def _local(ids: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first, 0 for those of other ranks, and which are this rank's."""
    local = ids - axis.index * size
    mine = (local >= 0) & (local < size)
    return torch.where(mine, local, 0), mine
