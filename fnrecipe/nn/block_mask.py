"""FlexAttention within documents, for GPUs: pairs of blocks in which no query attends to a key are never computed.

(Dong et al. 2024, arXiv:2412.05496.) torch's own function needs `torch.compile` around Python, which must not be given what
`torch.func` differentiates. So this module calls the two operations below it, which `make_fx` puts into the graph and Inductor
compiles. Run eagerly, they compute all T x T scores: right on every device, and slow.

Annotations are evaluated here: as strings they would get into traced graphs, which torch then does not find in its cache.
"""

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import tree

BLOCK = 128
"""Positions in a block: torch's default."""

_PADDING = 2**31
"""The segment number of padding: greater than all others, because padding comes last."""

_OPTIONS = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""What torch's own function passes on when logsumexp is kept for the gradient."""


@tree.node
@attrs.frozen(eq=False)
class BlockMask:
    """Which blocks attend to which, in B rows of N blocks.

    segments  int64 [B, T]; -1 for padding
    keys      (counts int32 [B, 1, N], numbers int32 [B, 1, N, N]) twice: for each block of queries the partial blocks of keys,
              with some pairs masked, then the full ones, with none; only the first `counts` of the numbers are valid
    queries   the same for each block of keys
    """

    segments: Tensor
    keys: tuple[Tensor, Tensor, Tensor, Tensor]
    queries: tuple[Tensor, Tensor, Tensor, Tensor]


def block_mask(segments: Tensor, size: int = BLOCK) -> BlockMask:
    """The mask of rows of segments, from the least and the greatest segment of each block; nothing is as large as T x T."""
    # Two blocks are compared as ranges of segment numbers. If the ranges do not overlap, no pair shares a segment; if both are
    # the same single segment, all pairs do; in between, the kernel looks at each pair. With segments in any order a range may
    # hold numbers that do not occur, so a block may be listed as partial needlessly, but none is left out.
    numbers = torch.where(segments < 0, _PADDING, segments)
    blocked = F.pad(numbers, (0, -segments.shape[1] % size), value=_PADDING).view(len(segments), 1, -1, size)
    least, greatest = blocked.amin(-1), blocked.amax(-1)
    first, last = least[..., :, None], greatest[..., :, None]
    number = torch.arange(least.shape[-1], device=segments.device)
    overlap = (first <= last.mT) & (first.mT <= last) & (number[:, None] >= number)
    full = (first == last.mT) & (last == first.mT) & (number[:, None] > number)
    partial = overlap & ~full
    return BlockMask(segments, (*_listed(partial), *_listed(full)), (*_listed(partial.mT), *_listed(full.mT)))


def flex_forward(mask: BlockMask, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, T, E] and its logsumexp to base 2, float32 [B, H, T]; query [B, H, T, E], key and value [B, G, T, E]."""
    mixed, logsumexp, _ = torch.ops.higher_order.flex_attention(query, key, value, _same, *_options(mask, query))
    return mixed, logsumexp


def flex_backward(
    mask: BlockMask, gradient: Tensor, mixed: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from `gradient`, that of the attention `mixed`."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.higher_order.flex_attention_backward(
        query, key, value, mixed, logsumexp, gradient, None, _same, _gradient_of_same, *_options(mask, query)
    )[:3]
    return gradients


def _options(mask: BlockMask, query: Tensor) -> tuple[object, ...]:
    """The last arguments of both operations: block mask, scale, kernel options, captures of score and mask functions."""
    length = query.shape[2]
    blocks = (length, length, *mask.keys, *mask.queries, *[None] * 4, BLOCK, BLOCK, _sees)
    return blocks, query.shape[-1] ** -0.5, _OPTIONS, (), (mask.segments,)


def _sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor, segments: Tensor) -> Tensor:
    return (segments[row, query] == segments[row, key]) & (query >= key)


def _same(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _gradient_of_same(
    score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor, gradient: Tensor
) -> list[Tensor | None]:
    return [gradient, None, None, None, None]


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `pairs` [..., N] hold, int32 [...], and the indices of these, then of the others, int32 [..., N]."""
    return pairs.sum(-1, dtype=torch.int32), pairs.int().argsort(dim=-1, descending=True, stable=True).int()
