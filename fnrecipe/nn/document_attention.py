"""Attention within documents on the CPU, by torch's flash attention for a block of queries of one document at a time.

Given a whole row, that kernel computes its 512 next keys for all queries alike, whatever a mask says of them. Given the queries
of a block, and the keys from the beginning of their document to the end of the block, it computes hardly a pair in vain, and
what it works on lies in a cache. So the work grows with the squares of the documents, not of the rows, and there is no mask of
all pairs. Rows that are no longer than a block are computed at once, with a mask: a call costs more than their pairs. B rows,
T positions, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import attrs
import torch
from torch import Tensor

from fnrecipe import ops, tree
from fnrecipe.nn.documents import document_bounds

_BLOCK = 64
"""Queries of a block: the best, or within 3 % of it, of 32 to 256 for rows of 256 to 2048 positions."""

aten = torch.ops.aten


@tree.node
@attrs.frozen(eq=False)
class DocumentMask:
    """The earlier positions of the same document, of which at most `window` with itself.

    first  int64 [B, T]: where the document of each position begins in its row; padding is a document, too
    """

    first: Tensor
    window: int | None = attrs.field(default=None, metadata=tree.STATIC)


def document_mask(segments: Tensor, window: int | None = None) -> DocumentMask:
    """The mask of rows of segments, int64 [B, T]: where the segment changes, a document begins."""
    return DocumentMask(document_bounds(segments)[0], window)


def pairs(first: Tensor, window: int | None) -> Tensor:
    """The pairs of positions, query and key, that see each other, bool [B, 1, T, T]; see `DocumentMask`."""
    number = torch.arange(first.shape[1])
    return _near(number - number[:, None], window) & (number >= first[:, None, :, None])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    if first.shape[1] <= _BLOCK:
        return aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, attn_mask=_added(pairs(first, window), query), scale=scale
        )
    mixed, logsumexp = _results(query)
    band = _band(query, window)
    queries, keys, values, *results = map(_joined, (query, key, value, mixed, logsumexp))
    for start, middle, end in _blocks(first, window):
        found = aten._scaled_dot_product_flash_attention_for_cpu(
            _part(queries, middle, end),
            _part(keys, start, end),
            _part(values, start, end),
            attn_mask=_corner(band, end - middle, end - start),
            scale=scale,
        )
        for whole, part in zip(results, found, strict=True):
            _part(whole, middle, end).copy_(part)
    return mixed, logsumexp


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    logsumexp: Tensor,
    first: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if first.shape[1] <= _BLOCK:
        inputs = gradient, query, key, value, mixed, logsumexp, 0.0, False
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            *inputs, attn_mask=_added(pairs(first, window), query), scale=scale
        )
    # What the blocks of a document add to the slopes of a key is summed in float32 at least.
    of_query, of_key, of_value = _like(query), *(_like(x, _precise(x)).zero_() for x in (key, value))
    band = _band(query, window)
    gradients, queries, keys, values = map(_joined, (gradient, query, key, value))
    of_queries, of_keys, of_values, mixed, logsumexp = map(_joined, (of_query, of_key, of_value, mixed, logsumexp))
    for start, middle, end in _blocks(first, window):
        slopes = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _part(gradients, middle, end),
            _part(queries, middle, end),
            _part(keys, start, end),
            _part(values, start, end),
            _part(mixed, middle, end),
            _part(logsumexp, middle, end),
            0.0,
            False,
            attn_mask=_corner(band, end - middle, end - start),
            scale=scale,
        )
        _part(of_queries, middle, end).copy_(slopes[0])
        _part(of_keys, start, end).add_(slopes[1])
        _part(of_values, start, end).add_(slopes[2])
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(first: Tensor, window: int | None) -> Iterator[tuple[int, int, int]]:
    """The first key, the first query and the end of both, of each block: of at most `_BLOCK` queries of a document.

    They are positions of the rows one after the other.
    """
    rows, length = first.shape
    begins = first + torch.arange(0, rows * length, length)[:, None]
    for begin, behind in pairwise([*sorted(set(begins.flatten().tolist())), rows * length]):
        for middle in range(begin, behind, _BLOCK):
            start = begin if window is None else max(begin, middle - window + 1)
            yield start, middle, min(middle + _BLOCK, behind)


def _band(query: Tensor, window: int | None) -> Tensor:
    """What is added to the scores of the last `_BLOCK` queries of a row, [_BLOCK, T or more]: -inf for keys not seen."""
    width = max(query.shape[2], _BLOCK)
    behind = torch.arange(width) - torch.arange(width - _BLOCK, width)[:, None]
    return _added(_near(behind, window), query)


def _near(behind: Tensor, window: int | None) -> Tensor:
    """Whether a key `behind` positions after the query is seen: none after it is, and of the others the `window` last."""
    return behind <= 0 if window is None else (behind <= 0) & (behind > -window)


def _added(seen: Tensor, query: Tensor) -> Tensor:
    """What is added to scores, so that only those of keys that are seen count."""
    return torch.where(seen, 0.0, -torch.inf).to(query.dtype)


def _corner(band: Tensor, queries: int, keys: int) -> Tensor:
    """The last queries and keys: what a pair adds depends on their distance alone."""
    return band.narrow(0, len(band) - queries, queries).narrow(1, band.shape[1] - keys, keys)


def _joined(x: Tensor) -> Tensor:
    """The rows of x [B, H, T, ...] one after the other, [1, H, B * T, ...]: a view of what `_like` makes."""
    return x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def _part(x: Tensor, start: int, end: int) -> Tensor:
    return x.narrow(2, start, end - start)


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the attention, [B, H, T, E], and the logsumexp of its scores, [B, H, T]."""
    return _like(query), _like(query[..., 0], _precise(query))


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a tensor like x [B, H, T, ...], in which the heads of a position lie side by side, as products want them."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


torch.library.impl("fnrecipe::document_attention", "CPU", _attention)
torch.library.impl("fnrecipe::document_attention_backward", "CPU", _attention_backward)
torch.library.register_fake(ops.document_attention.default, lambda query, *others: _results(query))
torch.library.register_fake(
    ops.document_attention_backward.default, lambda _, query, key, value, *others: tuple(map(_like, (query, key, value)))
)
