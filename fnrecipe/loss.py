"""Losses: `loss(params, batch) -> (sum to be differentiated, sums)`. Sums and counts, never means.

`sums` are 0-d tensors that add up over micro-batches, ranks and steps; means are taken once, over all of them, by the
count `targets`. `bytes` is there if the loss can be given in bits per byte of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from fnrecipe import nn, tree
from fnrecipe.data import Batch
from fnrecipe.tree import Tree

tree.node(Batch)

Apply: TypeAlias = Callable[[Tree, Tensor, Tensor, Tensor], nn.Logits]
"""(params, tokens, segments, positions) -> logits"""
Sums: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Tree, Any], tuple[Tensor, Sums]]


def next_token_loss(apply: Apply, sources: Sequence[str] = ()) -> Loss:
    """Cross entropy in nats of each target under the logits of `apply(params, tokens, segments, positions)`.

    Sums: `loss` float32, `targets` int64, `bytes` int64; with several `sources`, also `loss/NAME` and `targets/NAME` of each.
    """
    named = dict(enumerate(sources)) if len(sources) > 1 else {}

    def loss(params: Tree, batch: Batch) -> tuple[Tensor, Sums]:
        logits = apply(params, batch.tokens, batch.segments, batch.positions)
        total, nats = nn.cross_entropy(logits, batch.targets, batch.mask)
        sums = {"loss": total, "targets": batch.mask.sum(), "bytes": batch.num_bytes.sum()}
        for number, name in named.items():
            mine = batch.mask & (batch.sources == number)
            sums |= {f"loss/{name}": (nats * mine).sum(), f"targets/{name}": mine.sum()}
        return total, sums

    return loss
