"""Attention within documents by kernels for sequences of different lengths, for GPUs: no pair of two documents is computed.

In half precision that is cuDNN's kernel where it is installed and has one, else torch's FlashAttention 2 (Dao 2023,
arXiv:2307.08691); in float32 torch's memory-efficient kernel (Rabe & Staats 2021, arXiv:2112.05682). All are plain operations
of a graph: they are traced, compiled around and captured in CUDA graphs as any other. B rows, T positions, H heads, E head
width.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import ops, tree
from fnrecipe.nn import cudnn_attention

aten = torch.ops.aten

_MULTIPLE = 8
"""Head widths that kernels take are multiples of this."""


@tree.node
@attrs.frozen(eq=False)
class RaggedMask:
    """The earlier positions of the same document, of which at most `window` with itself.

    numbers     int64 [B, T]: number of each position's document in its row, from 0; padding is a document, too
    cumulative  int32 [B * N + 1]: where documents begin in the flattened rows, N of each row, then the number of all
                positions; documents that are not there are empty
    lengths     int32 [B * N]: their positions
    """

    numbers: Tensor
    cumulative: Tensor
    lengths: Tensor
    window: int | None = attrs.field(default=None, metadata=tree.STATIC)


def ragged_mask(segments: Tensor, limit: int, window: int | None = None) -> RaggedMask:
    """The mask of rows of segments, int64 [B, T], each of at most `limit` documents: where the segment changes, one begins."""
    # Kernels want a fixed number of documents, or every batch would be a graph of its own. A document that is not there begins
    # where the row ends, and so is empty. A row of exactly `limit` documents gives its padding to the last of them: padding
    # comes last, so no position with a target attends to it.
    rows, length = segments.shape
    if limit == 1:
        bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=segments.device)
        return RaggedMask(torch.zeros_like(segments), bounds, bounds.diff(), window)
    numbers = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)
    wanted = torch.arange(limit, device=segments.device).expand(rows, limit).contiguous()
    starts = torch.searchsorted(numbers, wanted) + torch.arange(0, rows * length, length, device=segments.device)[:, None]
    bounds = F.pad(starts.flatten(), (0, 1), value=rows * length).int()
    return RaggedMask(numbers, bounds, bounds.diff(), window)


def ragged_forward(mask: RaggedMask, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Attention [B, H, T, E], then what `ragged_backward` needs of it; query [B, H, T, E], key and value [B, G, T, E].

    Only in half precision may G be less than H.
    """
    flat = [_flat(x) for x in (query, key, value)]
    forward = _kernel(mask, query.shape[2], scale, *flat[:2])[0]
    mixed, logsumexp = forward(mask, query.shape[2], scale, *flat)
    return _rows(mixed, query), logsumexp


def ragged_backward(
    mask: RaggedMask,
    scale: float,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, from that of the attention `mixed` and the logsumexp of `ragged_forward`."""
    flat = [_flat(x) for x in (gradient, query, key, value, mixed)]
    backward = _kernel(mask, query.shape[2], scale, *flat[1:3])[1]
    slopes = backward(mask, query.shape[2], scale, logsumexp, *flat)
    return tuple(_rows(slope, like) for slope, like in zip(slopes, (query, key, value), strict=True))


def _kernel(
    mask: RaggedMask, longest: int, scale: float, query: Tensor, key: Tensor
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """The kernels forward and backward for query [B * T, H, E] and key [B * T, G, E]."""
    if query.dtype.itemsize >= 4:
        return _efficient, _efficient_backward
    wanted = cudnn_attention.layout(query, key, mask.lengths, longest, scale, mask.window)
    if cudnn_attention.is_supported(wanted, torch.are_deterministic_algorithms_enabled()):
        return _cudnn, _cudnn_backward
    return _flash, _flash_backward


def _cudnn(mask: RaggedMask, longest: int, scale: float, *inputs: Tensor) -> tuple[Tensor, ...]:
    bounds = cudnn_attention.bounds(mask.cumulative, mask.lengths, *inputs[:2])
    found: tuple[Tensor, ...] = ops.cudnn_attention(*inputs, bounds, longest, scale, mask.window)
    return found


def _cudnn_backward(mask: RaggedMask, longest: int, scale: float, logsumexp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    bounds = cudnn_attention.bounds(mask.cumulative, mask.lengths, *inputs[1:3])
    found: tuple[Tensor, ...] = ops.cudnn_attention_backward(
        *inputs, logsumexp, bounds, longest, scale, mask.window, torch.are_deterministic_algorithms_enabled()
    )
    return found


def _flash(mask: RaggedMask, longest: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    starts, left = mask.cumulative, mask.window and mask.window - 1
    found: tuple[Tensor, ...] = aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale, window_size_left=left
    )
    return found[:2]


def _flash_backward(mask: RaggedMask, longest: int, scale: float, logsumexp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = ops.flash_attention_backward(*inputs, logsumexp, mask.cumulative, longest, scale, mask.window)
    return found


def _efficient(mask: RaggedMask, longest: int, scale: float, *inputs: Tensor) -> tuple[Tensor, ...]:
    bounds, batch = (mask.cumulative, mask.cumulative, longest, longest), [x[None] for x in inputs]
    found = aten._efficient_attention_forward(
        *batch, None, *bounds, 0.0, ops.CAUSAL, True, scale=scale, window_size=mask.window
    )
    return found[0][0], found[1]


def _efficient_backward(mask: RaggedMask, longest: int, scale: float, logsumexp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    batch = [x[None] for x in inputs]
    found = ops.efficient_attention_backward(*batch, logsumexp, mask.cumulative, longest, scale, mask.window)
    return tuple(slope[0] for slope in found)


def _flat(x: Tensor) -> Tensor:
    """x [B, H, T, E] as the kernels take it: [B * T, H, E], with zeros behind E up to a width that they know."""
    missing = -x.shape[-1] % _MULTIPLE
    return (F.pad(x, (0, missing)) if missing else x).transpose(1, 2).flatten(0, 1).contiguous()


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x [B * T, H, E or more] in the shape of `like`, [B, H, T, E]."""
    batch, _, length, width = like.shape
    return x[..., :width].view(batch, length, -1, width).transpose(1, 2)
