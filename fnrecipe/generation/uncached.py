"""A model without a key-value cache, generated from all the same: what is kept are the tokens, and each is seen again."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.models.model import Apply, Cached, Model
from fnrecipe.nn.policy import Policy
from fnrecipe.tree import Tree

C = TypeVar("C")


def cached_by(model: Model[C]) -> Cached[C]:
    """The model's own cache, or one of tokens."""
    return uncached(model.apply) if model.cached is None else model.cached


def uncached(apply: Apply[C]) -> Cached[C]:
    return Cached(_no_tokens, partial(_extend, apply))


def _no_tokens(config: object, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, slots, dtype=torch.int64, device=device)


def _extend(
    apply: Apply[C],
    config: C,
    params: Tree,
    cache: Tree,
    tokens: Tensor,
    positions: Tensor,
    last: Tensor,
    *,
    limit: int,
    policy: Policy = Policy(),
) -> tuple[Tensor, Tree]:
    """Positions behind the last one are padding, which a causal model does not see."""
    kept = cache.clone().scatter_(1, positions, tokens)
    seen = kept[:, :limit]
    numbers = torch.arange(limit, device=seen.device).expand_as(seen)
    logits = nn.all_logits(apply(config, params, seen, torch.zeros_like(seen), numbers, policy=policy, scope="row"))
    chosen = positions.gather(1, last[:, None])[..., None].expand(-1, 1, logits.shape[-1])
    return logits.gather(1, chosen)[:, 0], kept
