"""The cross entropy of a head, whose logits are made a few positions at a time and never kept.

Logits are the largest values of a step: vocabulary times positions. Here the gradient is taken along with the value, chunk by
chunk, so that nothing is computed twice; `remat` of each chunk would multiply by the head again.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.ops import may_be_differentiated, optimization_barrier

_LIFT = 2.0**10
"""Probabilities of a large vocabulary are less than float16's normal numbers; a product with the head is much less than its
largest. Sums over positions are not lifted, for they grow with their number."""


@attrs.frozen(eq=False)
class DeferredLogits:
    """Logits [B, T, V] that are not multiplied out.

    x       [B, T, D]
    weight  [V, D]
    chunk   positions whose logits may be there at once
    """

    x: Tensor
    weight: Tensor
    chunk: int


def cross_entropy(logits: DeferredLogits, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the nats of `targets` where `mask` holds (float32 []), and the nats of all (float32 [B, T], no gradient).

    targets int64 [B, T], mask bool [B, T]. The sum may be differentiated once.
    """
    wanted = may_be_differentiated(logits.weight)  # not of a frozen head, and not in an evaluation
    total, nats, *_ = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.x.flatten(0, -2), logits.weight, targets.flatten(), mask.flatten(), logits.chunk, wanted
    )
    return total, nats.detach().view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any, weight: Any, targets: Any, mask: Any, chunk: int, wanted: bool) -> Any:
        rounded, nats, of_x, of_weight, latest = weight.to(x.dtype), [], [], None, None
        for part, chosen, counted in zip(x.split(chunk), targets.split(chunk), mask.split(chunk), strict=True):
            # Inductor would take all chunks together, and so have all logits at once.
            ordered = part if latest is None else optimization_barrier(part, latest)
            values, of_part, slope = _of_chunk(ordered, chosen, counted, rounded, wanted)
            nats.append(values)
            of_x.append(of_part)
            if slope is not None:
                of_weight = slope if of_weight is None else of_weight + slope
            latest = of_part if of_weight is None else of_weight
        values = torch.cat(nats)
        nothing = weight.new_empty(0)
        return (values * mask).sum(), values, torch.cat(of_x), nothing if of_weight is None else of_weight.to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, of_x, of_weight = output
        ctx.dtype, ctx.wanted = inputs[0].dtype, inputs[5]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(of_x, of_weight)

    @staticmethod
    def backward(ctx: Any, gradient: Any, *others: Any) -> Any:
        if any(other is not None for other in others):
            raise NotImplementedError("the cross entropy of deferred logits has no second derivative; take it of whole logits")
        of_x, of_weight = ctx.saved_tensors
        return (of_x * gradient).to(ctx.dtype), of_weight * gradient if ctx.wanted else None, None, None, None, None


def _of_chunk(x: Tensor, targets: Tensor, mask: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Nats [N], and the gradients of their masked sum for x [N, D] and, if it is wanted, weight [V, D] (float32).

    Powers are not divided by their sum: that is left to the gradients, which are smaller. Where x is float16, that for x is
    float32: it may need a loss scale before it is rounded.
    """
    logits = F.linear(x, weight).float()
    chosen, highest = logits.gather(-1, targets[:, None]), logits.amax(-1, keepdim=True)
    powers = logits.sub_(highest).exp_()  # in place: logits are there once
    total = powers.sum(-1, keepdim=True)
    nats = (highest + total.log() - chosen)[:, 0]
    if x.dtype == torch.float16:
        powers, total = powers * (_LIFT / total), torch.full_like(total, _LIFT)
    slopes, scale = powers.scatter_add_(-1, targets[:, None], -total).to(x.dtype), mask[:, None] / total
    of_x = (slopes @ weight) * scale
    of_weight = (slopes.t() @ (x * scale).to(x.dtype)).float() if wanted else None
    return nats, of_x if x.dtype == torch.float16 else of_x.to(x.dtype), of_weight
