"""Numbers about corpora and rows, against slow counts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fnrecipe.data import Corpus, Document, Tokens, byte_tokenizer, collate, open_corpus, pipe, watch_padding
from fnrecipe.data.survey import fill, read_through, survey
from fnrecipe.errors import DataError
from tests.data.laws import items, listed

TEXTS = [f"{'ä' * (number % 7)}{'x' * (number * 37 % 101)}" for number in range(600)]
LENGTHS = [len(text.encode()) for text in TEXTS if text]
BAD = {20: "no JSON", 300: '{"other": 1}', 599: '{"text": 3}'}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """600 lines, of which six are empty texts, three are blank and three are bad."""
    lines = [json.dumps({"text": text}) for text in TEXTS]
    for number, line in sorted({**BAD, 100: "", 200: " ", 400: "\t"}.items()):
        lines.insert(number, line)
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    return open_corpus(str(tmp_path / "a.jsonl"), byte_tokenizer())


def in_order(corpus: Corpus) -> list[Document | DataError]:
    return [item for block in corpus.blocks for item in corpus.read(block) if item or isinstance(item, DataError)]


def test_lengths_bytes_and_bad_records_are_those_of_a_slow_count(corpus: Corpus) -> None:
    found = survey(corpus, byte_tokenizer())
    assert found.lengths.dtype == np.int64
    assert found.lengths.tolist() == LENGTHS
    assert found.num_bytes == sum(LENGTHS)
    assert [str(error).partition(" (byte")[0].rpartition(":")[2] for error in found.bad] == ["21", "301", "600"]


@pytest.mark.parametrize("limit", [1, 19, 20, 21, 255, 256, 257, 299, 10_000])
def test_a_limit_takes_the_first_documents_and_the_bad_records_before_them(corpus: Corpus, limit: int) -> None:
    found, items = survey(corpus, byte_tokenizer(), limit), in_order(corpus)
    assert found.lengths.tolist() == LENGTHS[:limit]
    assert found.num_bytes == sum(LENGTHS[:limit])
    last = [place for place, item in enumerate(items) if isinstance(item, Document)][:limit][-1]
    assert len(found.bad) == sum(isinstance(item, DataError) for item in (items if limit > len(LENGTHS) else items[:last]))


def test_a_corpus_of_empty_documents_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    found = survey(open_corpus(str(tmp_path / "a.jsonl"), byte_tokenizer()), byte_tokenizer())
    assert (found.lengths.tolist(), found.num_bytes, list(found.bad)) == ([], 0, [])


def test_documents_that_are_tokens_already_are_counted_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([*b"abc", 256, *b"de", 256, 256, *b"f"], np.uint16))
    found = survey(open_corpus(str(tmp_path / "a.npy"), byte_tokenizer()), byte_tokenizer())
    assert (found.lengths.tolist(), found.num_bytes) == ([3, 2, 1], 6)


def test_reading_through_gives_each_block_with_its_documents(corpus: Corpus) -> None:
    found = list(read_through(corpus))
    assert [block for block, _ in found] == list(corpus.blocks)
    assert len(found) > 8
    assert [count for _, count in found] == [
        sum(isinstance(item, Document) for item in corpus.read(block)) for block in corpus.blocks
    ]
    assert sum(count for _, count in found) == len(TEXTS)


def piece(size: int) -> Tokens:
    return Tokens(np.arange(size + 1, dtype=np.int32), size)


def test_how_full_rows_are_is_added_up_over_batches() -> None:
    batches = [collate([[piece(3), piece(4)], [piece(10)], []], 10), collate([[piece(1)], [], []], 10)]
    found = fill(iter(batches))
    assert (found.positions, found.tokens, found.targets, found.pieces, found.rows) == (60, 18, 18, 4, 6)
    none = fill(iter([]))
    assert (none.positions, none.tokens, none.targets, none.pieces, none.rows) == (0, 0, 0, 0, 0)


def padded(caplog: pytest.LogCaptureFixture, targets: Sequence[int]) -> list[str]:
    """What is said of batches of one row of ten, with so many targets each."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        batches = [collate([[piece(count)] if count else []], 10) for count in targets]
        assert len(items(pipe(listed(batches), watch_padding))) == len(targets)
    return [record.getMessage().partition(";")[0] for record in caplog.records]


def test_rows_that_are_mostly_padding_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    assert padded(caplog, []) == padded(caplog, [8] * 600) == []
    assert padded(caplog, [7] * 600) == ["30 % of the positions of the first 8 batches are padding"]
    assert padded(caplog, [10] * 8 + [5] * 56) == ["44 % of the positions of the first 64 batches are padding"]
    assert padded(caplog, [2, 4]) == ["70 % of the positions of the first 2 batches are padding"]
