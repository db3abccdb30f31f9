"""Log-likelihoods of continuations: of the tokens at the end of rows, given those before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn
from fnrecipe.data.choices import Continuation
from fnrecipe.models.next_token import Apply
from fnrecipe.nn.linear_cross_entropy import DeferredLogits
from fnrecipe.tree import Tree

Likelihoods = Callable[[Tree, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(params, tokens, targets, mask) -> log-likelihoods float32 [B], and whether each target is the likeliest token, bool [B]"""


@attrs.frozen(eq=False)
class Rows:
    """Continuations as rows, padded on the right: tokens and targets int64 [B, T], mask bool [B, T] of what is scored."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor


def likelihoods(apply: Apply) -> Likelihoods:
    """The log-likelihood of the targets of each row where its mask holds, and whether all of them are the likeliest."""

    def of_rows(params: Tree, tokens: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        nats, likeliest = _nats(apply(params, tokens, torch.zeros_like(tokens), positions), targets)
        return -(nats * mask).sum(-1), (likeliest | ~mask).all(-1)

    return of_rows


def rows_of(found: Sequence[Continuation], rows: int, length: int) -> Iterator[Rows]:
    """Batches of `rows` rows of `length` inputs; the last one is filled up with rows without a target."""
    for start in range(0, len(found), rows):
        tokens, targets = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(2))
        mask = torch.zeros(rows, length, dtype=torch.bool)
        for row, each in enumerate(found[start : start + rows]):
            ids = torch.tensor([*each.given, *each.ids])
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            mask[row, len(each.given) - 1 : len(ids) - 1] = True
        yield Rows(tokens, targets, mask)


def _nats(logits: nn.Logits, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of the targets [B, T], float32, and whether each is the likeliest token; deferred logits a chunk at a time."""
    if not isinstance(logits, DeferredLogits):
        return _of_chunk(nn.all_logits(logits), targets)
    chunks = (torch.split(tensor, logits.chunk) for tensor in (logits.x.flatten(0, -2), targets.flatten()))
    parts = ((nn.all_logits(attrs.evolve(logits, x=part)), chosen) for part, chosen in zip(*chunks, strict=True))
    nats, likeliest = zip(*(_of_chunk(part, chosen) for part, chosen in parts), strict=True)
    return torch.cat(nats).view_as(targets), torch.cat(likeliest).view_as(targets)


def _of_chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    nats = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    return nats, wide.argmax(-1) == targets
