"""Cross entropy fused with the head: logits are computed for a chunk of positions at a time, and never kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.nn.objective import Objective, Terms
from fnrecipe.ops import Context, may_be_differentiated, optimization_barrier

_LIFT = 2.0**10
"""Factor on float16 probabilities, which for a large vocabulary are below float16's normal numbers. Sums over the vocabulary
stay far below float16's largest number; sums over positions, which grow with their number, are not lifted."""


_CPU_CHUNK = 512
"""Positions: 256, 512 and 1024 are level in speed, and 512 logits at once take no more memory than the rest of a step of 7M."""

_GPU_CHUNK = 600 * 2**20
"""Bytes of logits, beside which there are as many of their gradient when memory is fullest. Each chunk is a pass over the
gradient of the head (0.1 ms of the 31 of a step of 124M on an H200), so there are several only for the sake of memory."""


@attrs.frozen(eq=False)
class DeferredLogits:
    """Logits [B, T, V] as a product that has not been computed.

    x        [B, T, D]
    weight   [V, D]
    chunk    positions whose logits may be allocated at once
    softcap  the bound of each logit; None: none
    """

    x: Tensor
    weight: Tensor
    chunk: int
    softcap: float | None = None


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), which is close to the logits where these are far below the cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def chunk_size(x: Tensor, weight: Tensor) -> int:
    """How many positions of x [B, T, D] make one chunk of logits by the head `weight` [V, D]."""
    if x.device.type == "cpu":
        return _CPU_CHUNK
    positions = math.prod(x.shape[:-1])
    number = math.ceil(positions * weight.shape[0] * x.dtype.itemsize / _GPU_CHUNK)
    return math.ceil(positions / max(1, number))  # no short chunk behind the others


def cross_entropy(
    logits: DeferredLogits, targets: Tensor, weights: Tensor, objective: Objective = Objective()
) -> tuple[Tensor, Tensor, Terms]:
    """`fnrecipe.nn.cross_entropy` of logits that are deferred. The sum may be differentiated once."""
    wanted = may_be_differentiated(logits.weight)  # not of a frozen head, and not in an evaluation
    flat = logits.x.flatten(0, -2), logits.weight, targets.flatten(), weights.flatten()
    total, _, _, *values = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        *flat, logits.chunk, logits.softcap, wanted, objective
    )
    nats, *terms = (value.detach().view(targets.shape) for value in values)
    return total, nats, dict(zip(objective.names, terms, strict=True))


class _Context(Context, Protocol):
    dtype: torch.dtype
    wanted: bool


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    # Logits are the largest values of a step, vocabulary times positions. The loss is the end of the forward pass, and its
    # gradient for the logits needs nothing but them: so the gradients of x and weight are computed along with the value, a
    # chunk at a time, and saved in place of the logits. It takes the time of unchunked logits (325 ms on a CPU); `remat` of
    # each chunk would multiply by the head again, 100 ms more. A
    # second derivative is refused: the saved gradients are constants to autograd, and it would silently be zero.

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        softcap: float | None,
        wanted: bool,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        rounded = weight.to(x.dtype)
        found: list[Sequence[Tensor]] = []
        of_x: list[Tensor] = []
        of_weight: Tensor | None = None
        latest: Tensor | None = None
        chunks = (torch.split(tensor, chunk) for tensor in (x, targets, weights))
        for part, chosen, counted in zip(*chunks, strict=True):
            # Inductor would schedule the products of all chunks first, with all logits allocated at once.
            ordered = part if latest is None else optimization_barrier(part, latest)
            in_place = x.device.type == "cpu"
            given = ordered, chosen, counted, rounded, of_weight, wanted, in_place, softcap, objective
            values, of_part, of_weight = _of_chunk(*given)
            found.append(values)
            of_x.append(of_part)
            latest = of_part if of_weight is None else of_weight
        nats, *terms = (torch.cat(values) for values in zip(*found, strict=True))
        nothing = weight.new_empty(0)
        total, slope_of_x = (sum(terms, nats) * weights).sum(), torch.cat(of_x)
        return total, slope_of_x, nothing if of_weight is None else of_weight.to(weight.dtype), nats, *terms

    @staticmethod
    def setup_context(
        ctx: _Context,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, float | None, bool, Objective],
        output: tuple[Tensor, ...],
    ) -> None:
        _, of_x, of_weight, *_ = output
        ctx.dtype, ctx.wanted = inputs[0].dtype, inputs[6]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(of_x, of_weight)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(other is not None for other in others):
            raise NotImplementedError("the cross entropy of deferred logits has no second derivative; take it of whole logits")
        of_x, of_weight = ctx.saved_tensors
        return (of_x * gradient).to(ctx.dtype), of_weight * gradient if ctx.wanted else None, *[None] * 6


def _of_chunk(
    x: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight: Tensor,
    earlier: Tensor | None,
    wanted: bool,
    in_place: bool,
    softcap: float | None = None,
    objective: Objective = Objective(),
) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
    """Nats and terms, [N], and the gradients of their weighted sum for x [N, D] and, if it is wanted, weight [V, D] (float32).

    The latter is added to that of `earlier` chunks. The gradient for a float16 x is float32: it may need a loss scale before it
    is rounded.
    """
    # The gradient of the logits is (powers / total - onehot) * weights, with powers [N, V] and total [N, 1]. It is taken as
    # (powers - total * onehot) * (weights / total), whose second factor goes to the smaller x and its gradient, [N, D]: one
    # pass over the logits' memory less. On a CPU that memory is reused for all of this. On a GPU nothing is written into: then
    # a compiler makes two kernels of it, the sums of each row and the slopes, which both read the rounded logits.
    logits = softcapped(F.linear(x, weight).float(), softcap)
    falls = None if softcap is None else 1 - (logits / softcap).square()  # the derivative of the softcap
    chosen, highest = logits.gather(-1, targets[:, None]), logits.amax(-1, keepdim=True)
    mean = logits.mean(-1) if objective.label_smoothing else None
    if in_place:
        # Inductor writes into the logits in a kernel that is their only reader left: behind the two above, not fused with them.
        chosen = optimization_barrier(chosen, highest)
        highest = optimization_barrier(highest, chosen)
    powers = logits.sub_(highest).exp_() if in_place else (logits - highest).exp()
    total = powers.sum(-1, keepdim=True)
    log_total = highest + total.log()
    nats = (log_total - chosen)[:, 0]
    terms = objective.terms(nats, log_total[:, 0], mean) if objective.names else {}
    if x.dtype == torch.float16:
        powers, total = powers * (_LIFT / total), torch.full_like(total, _LIFT)
    slopes = _slopes(powers, total, log_total, targets, in_place, objective)
    slopes = (slopes if falls is None else slopes * falls).to(x.dtype)
    scale = weights[:, None] / total
    of_weight: Tensor | None = None
    if wanted:
        of_weight = (slopes.t() @ (x * scale).to(x.dtype)).float()
        of_weight = of_weight if earlier is None else earlier + of_weight
        # Inductor would put product and sum off, and hold what they are of until the end of the backward pass.
        scale = optimization_barrier(scale, of_weight)
    of_x = (slopes @ weight) * scale
    return [nats, *terms.values()], of_x if x.dtype == torch.float16 else of_x.to(x.dtype), of_weight


def _slopes(powers: Tensor, total: Tensor, log_total: Tensor, targets: Tensor, in_place: bool, objective: Objective) -> Tensor:
    """The gradient for the logits times `total`: powers (1 + 2c log_total) - total ((1 - ε) onehot + ε / V), [N, V]."""
    smoothing, size = objective.label_smoothing, powers.shape[-1]
    if objective.z_loss:
        factor = 1 + 2 * objective.z_loss * log_total
        powers = powers.mul_(factor) if in_place else powers * factor
    if smoothing:
        shared = total * (smoothing / size)
        powers = powers.sub_(shared) if in_place else powers - shared
    of_target = total * (1 - smoothing) if smoothing else total
    if in_place:
        places = torch.arange(len(targets)), targets
        return powers.index_put_(places, -of_target[:, 0], accumulate=True)
    onehot = targets[:, None] == torch.arange(size, device=powers.device)
    return powers - torch.where(onehot, of_target, 0)
