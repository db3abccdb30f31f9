"""Cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fnrecipe import nn
from fnrecipe.data import Batch
from fnrecipe.loss import Loss, Sums
from fnrecipe.tree import Tree


class Apply(Protocol):
    """Logits [B, T, V] of tokens, segments and positions, int64 [B, T]; `key`: what is random in training comes from it."""

    def __call__(
        self, params: Tree, tokens: Tensor, segments: Tensor, positions: Tensor, key: Tensor | None = None, /
    ) -> nn.Logits: ...


def next_token_loss(apply: Apply, sources: Sequence[str] = ()) -> Loss:
    """Cross entropy in nats of each target under the logits of `apply(params, tokens, segments, positions, key)`.

    Sums: `loss` float32, `targets` int64, `bytes` int64; with several `sources`, also `loss/NAME` and `targets/NAME` of each.
    """
    named = dict(enumerate(sources)) if len(sources) > 1 else {}

    def loss(params: Tree, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, Sums]:
        logits = apply(params, batch.tokens, batch.segments, batch.positions, key)
        total, nats = nn.cross_entropy(logits, batch.targets, batch.mask)
        sums = {"loss": total, "targets": batch.mask.sum(), "bytes": batch.num_bytes.sum()}
        for number, name in named.items():
            mine = batch.mask & (batch.sources == number)
            sums |= {f"loss/{name}": (nats * mine).sum(), f"targets/{name}": mine.sum()}
        return total, sums

    return loss
