"""A key-value cache of fixed size: keys and values lie in slots, a position's in the slot of its number.

So the positions of new tokens say all: where their keys and values go, and which slots they attend to. A slot with a later
number is not looked at, whatever is in it. B rows, T positions, S slots, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

import math

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import ops, tree


@tree.node
@attrs.frozen(eq=False)
class KeyValueCache:
    """The keys and values of a layer, [B, G, S, E]."""

    keys: Tensor
    values: Tensor


@tree.node
@attrs.frozen(eq=False)
class SlotMask:
    """The slots for which `bias` [B, 1, T, S], added to the scores, is 0 and not -inf: of the first `reach` [] at most."""

    bias: Tensor
    reach: Tensor


def stored(cache: KeyValueCache, key: Tensor, value: Tensor, positions: Tensor) -> KeyValueCache:
    """The cache with key and value [B, G, T, E], rounded to its dtype, in the slots of positions [B, T]."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    # Copies that `jit` drops if the cache is donated: then slots are written where they are.
    keys, values = cache.keys.clone(), cache.values.clone()
    for slots, new in ((keys, key), (values, value)):
        slots.transpose(1, 2).index_put_((rows, positions), new.transpose(1, 2).to(slots.dtype))
    return KeyValueCache(keys, values)


def slot_mask(positions: Tensor, slots: int, dtype: torch.dtype, window: int | None = None) -> SlotMask:
    """The mask of the first `slots` slots for attention in `dtype`: of those up to each position, the last `window` or all."""
    distance = positions[:, None, :, None] - torch.arange(slots, device=positions.device)
    seen = distance >= 0
    if window is not None and window < slots:
        seen = seen & (distance < window)
    return SlotMask(torch.where(seen, 0.0, -torch.inf).to(dtype), positions.max() + 1)


def slot_attention(query: Tensor, key: Tensor, value: Tensor, mask: SlotMask, scale: float | None = None) -> Tensor:
    """Softmax attention [B, H, T, E] of query [B, H, T, E] to the slots of key and value [B, G, S, E]; has no gradient here."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    if length == 1:
        # The queries of a group are rows of one product: its keys are read once, and not repeated.
        grouped = query.view(rows, groups, heads // groups, width)
        if query.device.type == "cpu":
            mixed: Tensor = ops.slot_attention(grouped, key, value, mask.bias, mask.reach, scale)
        else:
            mixed = F.scaled_dot_product_attention(grouped, key, value, mask.bias, scale=scale)
        return mixed.reshape(rows, 1, heads, width).transpose(1, 2)  # rows are contiguous for the product that follows
    if groups != heads:
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask.bias, scale=scale)
