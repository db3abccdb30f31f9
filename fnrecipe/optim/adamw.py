"""AdamW: as a chain of transforms, and as one fused kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.optim import fused_adamw, stochastic_rounding
from fnrecipe.optim.clip import clip_by_global_norm, clip_factor
from fnrecipe.optim.descent import descent
from fnrecipe.optim.fused_adamw import AdamStep
from fnrecipe.optim.moments import counter, running_mean, running_square, zeros
from fnrecipe.optim.partition import Mask, chosen, matrices
from fnrecipe.optim.schedule import Schedule, Scheduled
from fnrecipe.optim.transform import MeanGradient, Report, Transform
from fnrecipe.parallel.finite import largest
from fnrecipe.parallel.mesh import Shard, is_shard
from fnrecipe.tree import Tree


def scale_by_adam(b1: Scheduled = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Adam's direction (Kingma & Ba 2015, arXiv:1412.6980): the bias-corrected mean over the root of the mean square.

    A `b1` that changes over steps, b1[t] at update t, is reported as `momentum`. The weights of the gradients in the mean then
    add up to 1 - b1[1] b1[2] … b1[t], by which it is divided.

    State: `mean` and `square`, like the parameters, and `count`, int64 [], of the updates made; `product`, float64 [], of all
    b1 so far, if they change.
    """

    def init(params: Tree) -> Tree:
        count = counter(params)
        product = {"product": torch.ones_like(count, dtype=torch.float64)} if callable(b1) else {}
        return {**zeros(params, "mean", "square"), **product, "count": count}

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        count = state["count"] + 1
        new, report = {"count": count}, Report()
        if callable(b1):
            now = b1(step)
            product = state["product"] * now
            new, report = {"product": product, **new}, {"momentum": now}
            mean = running_mean(state["mean"], gradients, now)
        else:
            product, mean = torch.pow(b1, count.to(torch.float64)), running_mean(state["mean"], gradients, b1)
        square = running_square(state["square"], gradients, b2)
        scale, root = 1 / (1 - product), 1 / (1 - torch.pow(b2, count.to(torch.float64))).sqrt()
        direction = tree.map(lambda m, s: (m * scale / (s.sqrt() * root + eps)).to(m.dtype), mean, square)
        return direction, {"mean": mean, "square": square, **new}, report

    return Transform(init, update)


def adamw(
    schedule: Schedule,
    *,
    betas: tuple[Scheduled, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: Scheduled = 0.1,
    mask: Mask = matrices,
    max_norm: float | None = None,
    cautious_weight_decay: bool = False,
) -> Transform:
    """AdamW, behind clipping by global norm if `max_norm` is given; by default matrices decay, and vectors do not.

    As the whole update it runs a fused kernel (`fnrecipe.optim.fused_adamw`), which takes one pass over memory for what takes
    the chain fifteen. Unless `eps` or `1 - betas` are next to nothing, it knows beforehand that what it makes is finite: a step
    at whose sizes an element could overflow is not made, even if none would. With cautious decay, or a decay or a beta that
    changes over steps, it is always the chain.
    """
    clip = [] if max_norm is None else [clip_by_global_norm(max_norm)]
    whole = descent(
        scale_by_adam(*betas, eps),
        schedule=schedule,
        weight_decay=weight_decay,
        mask=mask,
        max_norm=max_norm,
        cautious_weight_decay=cautious_weight_decay,
    )
    b1, b2 = betas
    if cautious_weight_decay or callable(weight_decay) or callable(b1):
        return whole

    def fused_update(
        gradients: MeanGradient, state: Tree, params: Tree, step: Tensor, accept: Tensor, key: Tensor
    ) -> tuple[Tree, Tree, Report]:
        divisor = gradients.count if max_norm is None else gradients.count / clip_factor(gradients.norm, max_norm)
        before, moments, after = state[: len(clip)], state[len(clip)], state[len(clip) + 1 :]
        rate, count = schedule(step), moments["count"] + 1
        one = AdamStep(divisor, count, rate, (b1, b2), eps, accept)
        leaves = [*map(tree.leaves, (params, gradients.total, moments["mean"], moments["square"]))]
        decaying = chosen(params, mask)
        decays = [weight_decay if path in decaying else 0.0 for path in tree.paths(params, is_shard)]
        whole, narrow = tree.paths(params, is_shard), stochastic_rounding.narrow(params)
        seed = stochastic_rounding.seed(key, step) if narrow else step
        if fused_adamw.has_triton(step.device) and all(leaf.dtype in fused_adamw.BY_TRITON for leaf in leaves[0]):
            places = [stochastic_rounding.place(path, leaf) for path, leaf in whole.items()]
            found: Sequence[Sequence[Tensor]] = fused_adamw.adamw_by_triton(one, decays, seed, places, *leaves)
        elif narrow:
            found = _one_by_one(one, leaves, decays, whole, seed)
        else:
            found = fused_adamw.adamw(one, decays, *leaves)
        new_params, mean, square = (tree.like(params, tensors) for tensors in found)
        moments = {"mean": mean, "square": square, "count": torch.where(accept, count, moments["count"])}
        return new_params, (*before, moments, *after), {"lr": rate}

    def bounded(gradients: MeanGradient, state: Tree, params: Tree, step: Tensor) -> Tensor:
        rate, size = schedule(step), largest((params, state[len(clip)]["mean"]), params)
        return _adamw_is_bounded(gradients.norm, size, rate, b1, eps, weight_decay)

    tame = eps >= 1e-30 and max(b1, b2) <= 1 - 1e-6
    return attrs.evolve(whole, fused_update=fused_update, bounded=bounded if tame else None)


def _adamw_is_bounded(norm: Tensor, size: Tensor, rate: Tensor, b1: float, eps: float, weight_decay: float) -> Tensor:
    """Whether AdamW cannot overflow, for gradients of this norm and parameters and means of at most this `size`; bool [].

    In |p'| <= |p| (1 + rate decay) + rate |m'| / (1 - b1) / eps, with |m'| <= |m| + |g|, each factor is taken to be at least
    1, so that no product of some of them is larger than all. A square stays finite if that of the gradient does, and what is
    finite by so wide a margin is finite in bfloat16.
    """
    norm, size, rate = norm.double(), size.clamp(min=1), rate.abs().double().clamp(min=1)
    step = rate * (size + norm) / ((1 - b1) * min(eps, 1.0))
    return (size * (1 + rate * weight_decay) + step <= 1e38) & (norm <= 1e19)


def _one_by_one(
    step: AdamStep,
    leaves: Sequence[Sequence[Tensor]],
    decays: Sequence[float],
    places: Mapping[str, Tensor | Shard],
    seed: Tensor,
) -> tuple[Sequence[Tensor], ...]:
    """`fused_adamw.adamw` in the dtypes of the leaves: only one parameter and its moments at a time are there in float32."""

    def one(tensors: Sequence[Tensor], decay: float, path: str, whole: Tensor | Shard) -> list[Tensor]:
        wide = [[stochastic_rounding.wide(tensor)] for tensor in tensors]
        new = [tensor for (tensor,) in fused_adamw.adamw(step, [decay], *wide)]
        return stochastic_rounding.rounded(new, seed, path, whole) if stochastic_rounding.narrow(tensors[0]) else new

    return tuple(zip(*map(one, zip(*leaves, strict=True), decays, places.keys(), places.values()), strict=True))
