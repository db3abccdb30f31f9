"""The next-token loss against torch's cross entropy."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import random
from fnrecipe.data import Batch, Tokens
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.objective import Objective
from fnrecipe.shell.recording import jsonl as record
from fnrecipe.shell.recording.means import means
from fnrecipe.tree import Tree
from tests.helpers import documents, packed, tensors
from tests.helpers import rows as read_rows

VOCAB = 11


def table(params: Tree, tokens: Tensor, segments: Tensor, positions: Tensor, key: Tensor | None = None) -> Tensor:
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
    shown = means({"step": 1, "loss": 6.931471805599453, "targets": 5, "bytes": 20, "skipped": 0}, "train")
    expected = {"loss": 1.3862943611198906, "bits_per_byte": 0.5, "targets": 5, "bytes": 20, "skipped": 0}
    assert shown == pytest.approx({"step": 1, **{f"train/{name}": value for name, value in expected.items()}})


def test_without_targets_or_bytes_there_is_no_mean() -> None:
    shown = means({"step": 1, "loss": 0.0, "targets": 0, "bytes": 0}, "train")
    assert math.isnan(shown["train/loss"])
    assert "train/bits_per_byte" not in shown


NAMES = ["web", "code/c", "empty"]
BY_SOURCE = next_token_loss(table, NAMES)


def mixed() -> Batch:
    """Pieces of sources 0 and 1 side by side in rows; none of source 2."""
    pieces = [
        Tokens(ids, len(ids), source)
        for ids, source in zip(documents(3, 5, 2, 4, 9, vocab_size=VOCAB), [0, 1, 1, 0, 1], strict=True)
    ]
    return tensors([pieces[:2], pieces[2:4], pieces[4:], []], 9)


def slow_sums(rows: Batch, number: int) -> tuple[float, int]:
    """Nats and targets of the pieces of one source, position by position."""
    nats, count = 0.0, 0
    for i, j in zip(*torch.nonzero(rows.mask, as_tuple=True), strict=True):
        if rows.sources[i, j] == number:
            nats -= LOGITS[rows.tokens[i, j]].double().log_softmax(-1)[rows.targets[i, j]].item()
            count += 1
    return nats, count


def test_the_sums_of_each_source_are_those_of_its_targets_and_add_up() -> None:
    rows = mixed()
    total, sums = BY_SOURCE(LOGITS, rows)
    for number, name in enumerate(NAMES):
        nats, count = slow_sums(rows, number)
        assert sums[f"loss/{name}"].item() == pytest.approx(nats, rel=1e-6)
        assert sums[f"targets/{name}"].item() == count
    assert [sums[f"targets/{name}"].item() for name in NAMES] == [7, 16, 0]
    torch.testing.assert_close(sum(sums[f"loss/{name}"] for name in NAMES), total)
    assert sum(sums[f"targets/{name}"] for name in NAMES) == sums["targets"]


@pytest.mark.parametrize("names", [[], ["web"]])
def test_a_single_source_has_no_sums_of_its_own(names: list[str]) -> None:
    assert next_token_loss(table, names)(LOGITS, mixed())[1].keys() == {"loss", "targets", "bytes"}


def test_sums_by_source_change_neither_the_loss_nor_its_gradient() -> None:
    rows = mixed()
    found, expected = (
        torch.func.grad_and_value(loss, has_aux=True)(LOGITS, rows)  # type: ignore[attr-defined]
        for loss in (BY_SOURCE, LOSS)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][0], expected[1][0])
    _, sums = BY_SOURCE(LOGITS.clone().requires_grad_(), rows)
    assert [name for name, value in sums.items() if value.requires_grad] == ["loss"]


def test_what_is_masked_counts_for_no_source() -> None:
    rows = mixed()
    _, sums = BY_SOURCE(LOGITS, attrs.evolve(rows, mask=rows.mask & (rows.sources != 0)))
    assert (sums["loss/web"], sums["targets/web"]) == (0, 0)
    assert sums["targets/code/c"] == sums["targets"] == 16


def test_means_of_sources_are_over_their_own_targets() -> None:
    sums = {"loss": 12.0, "targets": 6, "bytes": 0, "loss/a/b": 2.0, "targets/a/b": 4, "loss/c": 10.0, "targets/c": 2}
    expected = {f"train/{name}": value for name, value in {**sums, "loss": 2.0, "loss/a/b": 0.5, "loss/c": 5.0}.items()}
    assert means({"step": 1, **sums}, "train") == {"step": 1, **expected}


def test_a_source_without_targets_has_no_mean_and_is_written_as_null(tmp_path: Path) -> None:
    shown = means({"step": 1, "loss": 3.0, "targets": 2, "loss/a": 3.0, "targets/a": 2, "loss/b": 0.0, "targets/b": 0}, "a")
    assert math.isnan(shown["a/loss/b"])
    record.append(tmp_path / "train.jsonl", [shown])
    (row,) = read_rows(tmp_path / "train.jsonl")
    assert (row["a/loss/a"], row["a/loss/b"], row["a/targets/b"]) == (1.5, None, 0)


KEY = random.key(0)
BY_DOCUMENT = next_token_loss(table, NAMES, length_normalization=True)


def example(row: int, segment: int, rows: Batch) -> tuple[float, int]:
    """The mean nats of a document's targets, and its source."""
    places = [j for j in range(rows.mask.shape[1]) if rows.segments[row, j] == segment and rows.mask[row, j]]
    nats = [-LOGITS[rows.tokens[row, j]].double().log_softmax(-1)[rows.targets[row, j]].item() for j in places]
    return sum(nats) / len(nats), int(rows.sources[row, places[0]])


def test_with_length_normalization_each_document_counts_the_same() -> None:
    rows = mixed()
    mask = rows.mask.clone()
    mask[0, 0] = mask[1, :2] = False  # the first of them lies behind its document's first position, the others are a whole one
    rows = attrs.evolve(rows, mask=mask)
    found = [example(row, segment, rows) for row, segment in ((0, 0), (0, 1), (1, 1), (2, 0))]
    total, sums = BY_DOCUMENT(LOGITS, rows, KEY)
    assert total.item() == sums["loss"].item() == pytest.approx(sum(nats for nats, _ in found), rel=1e-6)
    assert sums["targets"] == 4
    assert sums["tokens"] == mask.sum()
    assert "bytes" not in sums
    for number, name in enumerate(NAMES):
        nats = [nats for nats, source in found if source == number]
        assert sums[f"loss/{name}"].item() == pytest.approx(sum(nats), rel=1e-6)
        assert sums[f"targets/{name}"] == len(nats)


def test_length_normalized_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    rows, fields = mixed(), attrs.fields(Batch)
    parts = [Batch(*(getattr(rows, field.name)[i : i + 1] for field in fields)) for i in range(4)]
    for name, value in BY_DOCUMENT(LOGITS, rows, KEY)[1].items():
        torch.testing.assert_close(sum(BY_DOCUMENT(LOGITS, part, KEY)[1][name] for part in parts), value)


@pytest.mark.parametrize("by_document", [False, True])
def test_terms_are_sums_beside_the_nats(by_document: bool) -> None:
    given = Objective(label_smoothing=0.1, z_loss=0.01)
    plain, loss = (next_token_loss(table, NAMES, o, length_normalization=by_document) for o in (Objective(), given))
    (nats, before), (total, sums) = plain(LOGITS, mixed(), KEY), loss(LOGITS, mixed(), KEY)
    terms = {key: value for key, value in sums.items() if key.startswith("mean/")}
    assert sums.keys() - terms.keys() == before.keys()
    assert terms.keys() == {"mean/label_smoothing", "mean/z_loss"}
    torch.testing.assert_close({key: sums[key] for key in before}, before)
    torch.testing.assert_close(total, nats + sum(terms.values()))


def test_an_evaluation_measures_nats_of_targets() -> None:
    loss = next_token_loss(table, NAMES, Objective(label_smoothing=0.1, z_loss=0.01), length_normalization=True)
    found, expected = loss(LOGITS, mixed(), None), BY_SOURCE(LOGITS, mixed(), None)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
