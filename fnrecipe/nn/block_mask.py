"""FlexAttention within documents, for GPUs: blocks of positions of which no pair sees each other are never computed.

(Dong et al. 2024, arXiv:2412.05496.) torch's own function wants `torch.compile` around Python, which must not be given what
`torch.func` differentiates. So here are the two operations below it, for `make_fx` to put into the graph and for Inductor to
make kernels of. Run as they are, they compute whole T x T scores: right on every device, and slow.

Annotations are evaluated here: as strings they would be in traced graphs, for which torch would not look into its cache.
"""

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import tree

BLOCK = 128
"""Positions in a block: torch's own choice."""

_PADDING = 2**31
"""The number of what is padding: it comes last, and so is greatest."""

_OPTIONS = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""What torch's own function passes on, where logsumexp is kept for the gradient."""


@tree.node
@attrs.frozen(eq=False)
class BlockMask:
    """Which blocks see which, of B rows of N blocks.

    segments  int64 [B, T]; -1 where the row is padding
    keys      (counts int32 [B, 1, N], numbers int32 [B, 1, N, N]) twice: for each block of queries the blocks of keys that it
              sees in part, then those that it sees as a whole; the first `counts` of the numbers are meant
    queries   the same for each block of keys
    """

    segments: Tensor
    keys: tuple[Tensor, Tensor, Tensor, Tensor]
    queries: tuple[Tensor, Tensor, Tensor, Tensor]


def block_mask(segments: Tensor, size: int = BLOCK) -> BlockMask:
    """From the least and the greatest segment of each block; nothing is as large as T x T.

    Whatever the order of segments in a row, no pair that sees each other is left out.
    """
    numbers = torch.where(segments < 0, _PADDING, segments)
    blocked = F.pad(numbers, (0, -segments.shape[1] % size), value=_PADDING).view(len(segments), 1, -1, size)
    least, greatest = blocked.amin(-1), blocked.amax(-1)
    first, last = least[..., :, None], greatest[..., :, None]
    number = torch.arange(least.shape[-1], device=segments.device)
    overlap = (first <= last.mT) & (first.mT <= last) & (number[:, None] >= number)
    whole = (first == last.mT) & (last == first.mT) & (number[:, None] > number)
    part = overlap & ~whole
    return BlockMask(segments, (*_listed(part), *_listed(whole)), (*_listed(part.mT), *_listed(whole.mT)))


def flex_forward(mask: BlockMask, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, T, E], and its logsumexp to the base 2, float32 [B, H, T]; query as it, key and value [B, G, T, E]."""
    mixed, logsumexp, _ = torch.ops.higher_order.flex_attention(query, key, value, _same, *_options(mask, query))
    return mixed, logsumexp


def flex_backward(
    mask: BlockMask, gradient: Tensor, mixed: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for query, key and value from that for `mixed`."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.higher_order.flex_attention_backward(
        query, key, value, mixed, logsumexp, gradient, None, _same, _gradient_of_same, *_options(mask, query)
    )[:3]
    return found


def _options(mask: BlockMask, query: Tensor) -> tuple[Any, ...]:
    """The arguments that both operations end with: lists of blocks, scale, options, and what the mask looks into."""
    length = query.shape[2]
    given = (length, length, *mask.keys, *mask.queries, *[None] * 4, BLOCK, BLOCK, _sees)
    return given, query.shape[-1] ** -0.5, _OPTIONS, (), (mask.segments,)


def _sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor, segments: Tensor) -> Tensor:
    return (segments[row, query] == segments[row, key]) & (query >= key)


def _same(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _gradient_of_same(
    score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor, gradient: Tensor
) -> list[Tensor | None]:
    return [gradient, None, None, None, None]


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last axis hold, int32 [...], and their numbers, before those of the others, int32 [..., N]."""
    return pairs.sum(-1, dtype=torch.int32), pairs.int().argsort(dim=-1, descending=True, stable=True).int()
