"""Cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.data import Batch
from fnrecipe.loss import Loss, Sums
from fnrecipe.nn.objective import Objective
from fnrecipe.tree import Tree


class Apply(Protocol):
    """Logits [B, T, V] of tokens, segments and positions, int64 [B, T]; `key`: what is random in training comes from it."""

    def __call__(
        self, params: Tree, tokens: Tensor, segments: Tensor, positions: Tensor, key: Tensor | None = None, /
    ) -> nn.Logits: ...


def next_token_loss(
    apply: Apply, sources: Sequence[str] = (), objective: Objective = Objective(), *, length_normalization: bool = False
) -> Loss:
    """Cross entropy in nats of each target under the logits of `apply(params, tokens, segments, positions, key)`.

    Sums: `loss` float32, `targets` int64, `bytes` int64; with several `sources`, also `loss/NAME` and `targets/NAME` of each.

    What is minimised is `loss` and the terms of the objective, each a sum `mean/TERM`. With `length_normalization` each
    document in a row counts as one target, of the mean over its targets; `tokens` then are the targets, and there are no
    `bytes`. In an evaluation, without a key, there is neither: nats of targets are measured.
    """
    named = dict(enumerate(sources)) if len(sources) > 1 else {}

    def loss(params: Tree, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, Sums]:
        by_document = length_normalization and key is not None
        weights, counted = document_weights(batch) if by_document else (batch.mask, batch.mask)
        logits = apply(params, batch.tokens, batch.segments, batch.positions, key)
        total, nats, terms = nn.cross_entropy(logits, batch.targets, weights, Objective() if key is None else objective)
        sums = {"loss": (nats * weights).sum() if terms else total, "targets": counted.sum()}
        sums |= {"tokens": batch.mask.sum()} if by_document else {"bytes": batch.num_bytes.sum()}
        sums |= {f"mean/{name}": (term * weights).sum() for name, term in terms.items()}
        for number, name in named.items():
            here = batch.sources == number
            mine = counted & here
            share = weights * here if by_document else mine
            sums |= {f"loss/{name}": (nats * share).sum(), f"targets/{name}": mine.sum()}
        return total, sums

    return loss


def document_weights(batch: Batch) -> tuple[Tensor, Tensor]:
    """By what the mean over the targets of each document is a sum over targets, float32 [B, T], and a position of each, bool.

    Documents without a target have none.
    """
    targets = nn.document_sums(batch.mask, batch.segments)
    first = nn.document_bounds(batch.segments)[0] == torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return batch.mask / targets.clamp(min=1), first & (targets > 0)
