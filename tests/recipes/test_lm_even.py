"""The law of even use: in an epoch every document once, and none again before every other one was used as often."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.config import DataSource
from fnrecipe.data import Batch, Cursor, LaneAssignment, endless, joint
from fnrecipe.data.rows import join
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import train_stream
from tests.data.laws import items
from tests.recipes.streams import END, lines, recipe, train, write


def named(number: int, size: int) -> str:
    """A document that is recognised by its first bytes."""
    return f"d{number}>".ljust(size, ".")


def starts(batch: Batch) -> list[str]:
    """The names of the documents whose first piece is in a batch."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in range(segments.max() + 1):
            ids = tokens[segments == segment].tolist()
            if ids[0] == END:
                found.append(bytes(i for i in ids[1:] if i < END).decode().partition(">")[0])
    return found


def check_law(found: Iterable[Sequence[str]], *sources: Sequence[str]) -> Counter[str]:
    """How often each document was used, when after no batch two of a source are apart by more than one."""
    used = Counter(dict.fromkeys(chain(*sources), 0))
    for step, names in enumerate(found):
        used.update(names)
        assert len(used) == sum(map(len, sources))
        for source in sources:
            counts = [used[name] for name in source]
            assert max(counts) - min(counts) <= 1, f"after step {step}: {used}"
    return used


def ranks(config: LMConfig, size: int, cursor: Cursor, limit: int) -> tuple[list[Batch], Cursor]:
    """Up to `limit` global batches of a gang of some size, and its cursor behind them."""
    streams = [endless(train_stream(config, LaneAssignment(rank, size)), cursor) for rank in range(size)]
    found: list[Batch] = []
    last = cursor
    for entries in islice(zip(*streams, strict=True), limit):
        given = [part for part, _ in entries if part is not None]
        if not given:
            break
        found.append(join(given))
        last = json.loads(json.dumps(joint(cursor, [after for _, after in entries])))
    return found, last


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "max_seq_len": st.sampled_from([8, 31, 64, 257]),
    "num_lanes": st.sampled_from([1, 2, 4, 8]),
    "pack_window": st.sampled_from([1, 5, 512]),
    "shuffle_window": st.sampled_from([1, 7, 256]),
    "order": st.sampled_from(["blocks", "documents", "sequential"]),
    "packing": st.sampled_from(["best_fit", "best_fit", "concat"]),
}
SIZES = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 200)), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(options=st.fixed_dictionaries(OPTIONS), sizes=SIZES, other=SIZES, weight=st.floats(0.05, 20), worlds=st.data())
def test_documents_are_used_evenly_whatever_the_lanes_and_weights_and_after_resuming(
    tmp_path_factory: pytest.TempPathFactory, options: Any, sizes: list[int], other: list[int], weight: float, worlds: Any
) -> None:
    folder = tmp_path_factory.mktemp("even")
    first = iter(map(chr, range(ord("!"), ord("~"))))  # each document begins with a letter of its own
    texts = [[next(first) + "~" * size for size in found] for found in (sizes, other)]
    sources = [write(folder / f"{number}.jsonl", found) for number, found in enumerate(texts)]
    sources[1] = attrs.evolve(sources[1], weight=weight)
    config = recipe(*sources, epochs=None, batch_size=options["num_lanes"], **options)
    found: list[Batch] = []
    cursor: Cursor = None
    for _ in range(3):
        size = worlds.draw(st.sampled_from([size for size in (1, 2, 4, 8) if size <= options["num_lanes"]]))
        more, cursor = ranks(config, size, cursor, worlds.draw(st.integers(1, 15)))
        found += more
    letters = ([chr(i) for i in batch.targets[batch.mask].tolist() if i not in (END, ord("~"))] for batch in found)
    check_law(letters, *([text[0] for text in some] for some in texts))


def as_jsonl(folder: Path, files: Sequence[Sequence[str]]) -> DataSource:
    for number, texts in enumerate(files):
        write(folder / f"{number}.jsonl", texts)
    return DataSource(str(folder))


def as_gzip(folder: Path, files: Sequence[Sequence[str]]) -> DataSource:
    for number, texts in enumerate(files):
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines(texts).encode()))
    return DataSource(str(folder))


def as_parquet(folder: Path, files: Sequence[Sequence[str]]) -> DataSource:
    for number, texts in enumerate(files):
        pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), folder / f"{number}.parquet", row_group_size=9)
    return DataSource(str(folder))


def as_text(folder: Path, files: Sequence[Sequence[str]]) -> DataSource:
    for number, text in enumerate(text for texts in files for text in texts):
        (folder / f"{number}.txt").write_text(text)
    return DataSource(str(folder))


def as_tokens(folder: Path, files: Sequence[Sequence[str]]) -> DataSource:
    for number, texts in enumerate(files):
        np.save(folder / f"{number}.npy", np.array([i for text in texts for i in (*text.encode(), END)], np.uint16))
    return DataSource(str(folder))


FORMATS: list[Callable[[Path, Sequence[Sequence[str]]], DataSource]] = [as_jsonl, as_gzip, as_parquet, as_text, as_tokens]
SHAPES = {"nine equal files": [20] * 9, "twelve documents": [12], "thirty": [30], "one": [1], "uneven files": [50, 1, 1, 3]}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_used_evenly_by_eight_lanes(tmp_path: Path, form: Any, shape: Sequence[int]) -> None:
    numbers = iter(range(sum(shape)))
    files = [[named(number, 10 + 7 * number % 60) for number in islice(numbers, size)] for size in shape]
    config = recipe(form(tmp_path, files), epochs=None, num_lanes=8, batch_size=8, max_seq_len=64)
    batches = (starts(batch) for batch, _ in islice(train(config)(None), 60))
    used = check_law(batches, [f"d{number}" for number in range(sum(shape))])
    assert min(used.values()) >= 2


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("epochs", [1, 3])
def test_lanes_of_a_finite_run_end_with_the_same_step(tmp_path: Path, form: Any, epochs: int) -> None:
    files = [[named(20 * file + i, 10 + 7 * i % 60) for i in range(20)] for file in range(9)]
    batches = items(train(recipe(form(tmp_path, files), epochs=epochs, num_lanes=8, batch_size=8, max_seq_len=64)))
    assert set(check_law(map(starts, batches), [f"d{number}" for number in range(180)]).values()) == {epochs}
    assert all(batch.mask.any(axis=1).all() for batch in batches[:-1])


def padding(batches: Sequence[Batch]) -> float:
    return 1 - sum(batch.mask.sum() for batch in batches) / sum(batch.mask.size for batch in batches)


@pytest.mark.parametrize(("count", "size", "limit"), [(2, 20, 0.11), (12, 60, 0.07), (12, 500, 0.18), (200, 60, 0.04)])
def test_epochs_that_end_in_the_middle_of_a_row_leave_little_padding(
    tmp_path: Path, count: int, size: int, limit: float
) -> None:
    source = write(tmp_path / "a.jsonl", [named(i, size // 2 + 7 * i % size) for i in range(count)])
    rows = {"max_seq_len": 1024, "max_documents_per_row": 1024, "pack_window": 512}
    config = recipe(source, epochs=None, num_lanes=8, batch_size=8, **rows)
    assert padding([batch for batch, _ in islice(train(config)(None), 40)]) < limit


READERS = {"max_seq_len": 64, "batch_size": 8, "num_lanes": 8, "num_readers": 4}


@pytest.mark.parametrize("form", FORMATS)
def test_several_readers_use_every_document_once_an_epoch_and_end_within_a_block(tmp_path: Path, form: Any) -> None:
    files = [[named(40 * file + i, 10 + 7 * i % 60) for i in range(40)] for file in range(9)]
    batches = items(train(recipe(form(tmp_path, files), epochs=2, **READERS)))
    used = Counter(name for batch in batches for name in starts(batch))
    assert used == Counter({f"d{number}": 2 for number in range(360)})
    rows = [sum(int(batch.mask[lane].any()) for batch in batches) for lane in range(8)]
    assert max(rows) - min(rows) <= 18  # of 90, the rows of a few documents of a stripe of each file


def test_what_several_readers_make_uneven_is_told_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, size in enumerate([9000, 500, 500, 500, 500]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    with caplog.at_level(logging.WARNING):
        train(recipe(DataSource(str(tmp_path), name="books"), **READERS))
    (record,) = caplog.records
    assert record.getMessage().startswith("4 readers, each with a share of the data of its own: their epochs may end apart")
    assert record.getMessage().endswith("the largest share is above the mean by: books 227.3%")


def test_workers_without_a_reader_of_their_own_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(write(tmp_path / "a.jsonl", ["a"] * 9), num_workers=2, num_lanes=2)
    with caplog.at_level(logging.WARNING):
        train(config)
        train_stream(config, LaneAssignment(1, 2))
    (record,) = caplog.records
    assert record.getMessage().startswith("dataset.num_workers: expected at most 1")


def test_documents_of_the_same_key_are_the_same_at_any_number_of_ranks_of_a_reader(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [named(i, 10 + i % 90) for i in range(100)])
    for readers in (1, 2, 8):
        config = recipe(source, epochs=None, **{**READERS, "num_readers": readers})
        whole, cursor = ranks(config, 1, None, 12)
        for size in (2, 4, 8):
            found, other = ranks(config, size, None, 12)
            assert [batch.tokens.tolist() for batch in found] == [batch.tokens.tolist() for batch in whole]
            assert other == cursor
