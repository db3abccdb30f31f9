"""What a tokenizer loses is told once with its share and counts as nothing learnt, however the stream is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import torch

from fnrecipe.config import TokenizerSection
from fnrecipe.data import (
    Batch,
    Document,
    LaneAssignment,
    Source,
    byte_tokenizer,
    huggingface_tokenizer,
    in_worker_processes,
    tokenized,
)
from fnrecipe.recipes.lm import train as lm
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.shell.screen.once import Once
from fnrecipe.streams import example
from tests.data.kinds import KINDS, byte_level, dropping, save
from tests.data.laws import check_resumes, items, listed
from tests.recipes.streams import recipe, train, write

Options = Mapping[str, Any]
TEXTS = ["ab ab", "a1b2", "größe", "größe ab", "Q", "the ab"]
LOST = len("12ßßQ".encode())


def lossy(folder: Path, **dataset: Any) -> LMConfig:
    """A recipe on four copies of each of TEXTS, whose tokenizer drops digits, ß and capitals."""
    source = write(folder / "a.jsonl", TEXTS * 4)
    ends = TokenizerSection(family="hf", path=save(folder, dropping()))
    return recipe(source, ends=ends, order="sequential", **dataset)


class Records(logging.Handler):
    """Keeps what a filter that tells things once lets pass; not what is said of padding, which few documents leave much of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(Once())
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "are padding" not in record.getMessage():
            self.told.append(record.getMessage())


@pytest.fixture
def records() -> Iterator[Records]:
    found = Records()
    logging.getLogger("fnrecipe").addHandler(found)
    yield found
    logging.getLogger("fnrecipe").removeHandler(found)


@pytest.fixture
def told(records: Records) -> list[str]:
    return records.told


@pytest.mark.parametrize("dataset", [{}, {"num_lanes": 1}, {"packing": "concat"}])
def test_the_bytes_of_an_epoch_are_those_that_tokens_stand_for(tmp_path: Path, told: list[str], dataset: Options) -> None:
    batches: list[Batch] = items(train(lossy(tmp_path, **dataset)))
    kept = KINDS["BPE that drops"].kept
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == 4 * sum(len(kept(text).encode()) for text in TEXTS)
    assert len(told) == 1, "two lanes tell it, and one is enough"


def test_the_share_is_that_of_the_documents_read_at_once(tmp_path: Path, told: list[str]) -> None:
    items(train(lossy(tmp_path, num_lanes=1)))
    size = sum(len(text.encode()) for text in TEXTS)
    share = f"{100 * LOST / size:.2g} % of the text ({4 * LOST} of {4 * size} bytes)"
    assert [line.partition(": characters")[0] for line in told] == [f"a: the tokenizer loses {share}"]


def test_a_cache_changes_nothing_of_it(tmp_path: Path, told: list[str]) -> None:
    plain = [batch.num_bytes.tolist() for batch in items(train(lossy(tmp_path)))]
    for _ in range(2):
        assert [batch.num_bytes.tolist() for batch in items(train(lossy(tmp_path, cache=str(tmp_path / "cache"))))] == plain
    assert len(told) == 1


def test_two_workers_tell_it_once(tmp_path: Path, records: Records) -> None:
    config = lossy(tmp_path)
    make, padding = partial(train_stream, config), example(config, config.dataset.batch_size // 2)
    stream = in_worker_processes(make, assignment=LaneAssignment(), workers=2, size=2, padding=padding)
    found = [batch.num_bytes.tolist() for batch, _ in stream]
    assert len(records.told) == 1
    assert found == [batch.num_bytes.tolist() for batch in items(make(LaneAssignment()))]


def test_a_loss_late_in_a_source_is_told_too(tmp_path: Path, told: list[str]) -> None:
    tokenizer = huggingface_tokenizer(save(tmp_path, dropping()))
    documents: Source[Document] = listed([Document("ab ab") for _ in range(300)] + [Document("ab 1")])
    found = items(partial(tokenized, documents, tokenizer=tokenizer, name="web"))
    assert [tokens.lost for tokens in found] == [0] * 300 + [1]
    assert [line.partition(" (")[0] for line in told] == ["web: the tokenizer loses 0.45 % of the text"]


def test_nothing_is_told_where_nothing_is_lost(tmp_path: Path, told: list[str]) -> None:
    source = write(tmp_path / "a.jsonl", [*TEXTS, "東京 🙂\n"])
    for ends in (TokenizerSection(), TokenizerSection(family="hf", path=save(tmp_path, byte_level()))):
        items(train(recipe(source, ends=ends)))
    assert told == []


def test_tokenized_documents_resume(tmp_path: Path) -> None:
    documents: Source[Document] = listed([Document("ab" * number) for number in range(150)])
    assert check_resumes(partial(tokenized, documents, tokenizer=byte_tokenizer(), name="a"), 150) == 150


@pytest.mark.parametrize(
    ("add_bos", "prompt", "expected"),
    [(True, "ab", [256, 97, 98]), (True, "", [256]), (False, "ab", [97, 98]), (False, "", [256])],
)
def test_a_sample_begins_as_documents_do(add_bos: bool, prompt: str, expected: list[int]) -> None:
    config = recipe(ends=TokenizerSection(add_bos=add_bos))
    config = attrs.evolve(config, regime=attrs.evolve(config.regime, sample_prompt=prompt))
    with mock.patch.object(lm.presets, "sample", return_value=[99]) as sample:
        assert lm.sample(config, {}, torch.zeros(2)) == f"{prompt}c"
    assert sample.call_args.args[2] == expected
