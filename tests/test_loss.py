"""The next-token loss against torch's cross entropy."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe.data import Batch
from fnrecipe.loss import next_token_loss
from fnrecipe.metrics import means
from fnrecipe.tree import Tree
from tests.helpers import documents, packed

VOCAB = 11


def table(params: Tree, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """A bigram model: the logits after each token."""
    return params[tokens]


LOSS = next_token_loss(table)
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


def batch() -> Batch:
    draw = partial(documents, vocab_size=VOCAB)
    return packed([draw(5, 3, seed=1), draw(2, seed=2), []], 10)


def test_the_sum_is_torchs_over_the_targets_alone() -> None:
    rows = batch()
    ignoring = torch.where(rows.mask, rows.targets, -100)
    expected = F.cross_entropy(LOGITS[rows.tokens].flatten(0, 1), ignoring.flatten(), reduction="sum")
    total, sums = LOSS(LOGITS, rows)
    torch.testing.assert_close(total, expected)
    assert torch.equal(sums["loss"], total)
    assert sums["targets"] == 10
    assert sums["bytes"] == 6 + 4 + 3  # helpers count a byte a token
    assert {name: value.dtype for name, value in sums.items()} == {
        "loss": torch.float32,
        "targets": torch.int64,
        "bytes": torch.int64,
    }


def test_a_masked_target_counts_for_nothing() -> None:
    rows = batch()
    mask = rows.mask.clone()
    mask[0, 2] = False
    less, sums = LOSS(LOGITS, attrs.evolve(rows, mask=mask))
    nats = -LOGITS[rows.tokens[0, 2]].log_softmax(-1)[rows.targets[0, 2]]
    torch.testing.assert_close(LOSS(LOGITS, rows)[0] - less, nats, rtol=1e-5, atol=1e-5)
    assert sums["targets"] == 9


def test_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    rows = batch()
    fields = attrs.fields(Batch)
    parts = [Batch(*(getattr(rows, field.name)[i : i + 1] for field in fields)) for i in range(3)]
    _, whole = LOSS(LOGITS, rows)
    for name, value in whole.items():
        torch.testing.assert_close(sum(LOSS(LOGITS, part)[1][name] for part in parts), value)


def test_logits_in_half_precision_are_summed_in_single() -> None:
    total, _ = LOSS(LOGITS.bfloat16(), batch())
    assert total.dtype == torch.float32
    assert total == LOSS(LOGITS.bfloat16().float(), batch())[0]


def test_means_are_nats_a_target_and_bits_a_byte() -> None:
    shown = means({"loss": 6.931471805599453, "targets": 5, "bytes": 20, "skipped": 0})
    assert shown == pytest.approx({"loss": 1.3862943611198906, "bits_per_byte": 0.5, "targets": 5, "bytes": 20, "skipped": 0})


def test_without_targets_or_bytes_there_is_no_mean() -> None:
    shown = means({"loss": 0.0, "targets": 0, "bytes": 0})
    assert shown["loss"] != shown["loss"]
    assert "bits_per_byte" not in shown
