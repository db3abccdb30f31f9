from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from fnrecipe import streams
from fnrecipe.config import DataSource, TokenizerSection
from fnrecipe.data import Batch, LaneAssignment, Source, Tokens, pack, pipe, prefetch
from fnrecipe.data.pack import Row
from fnrecipe.recipes.lm.config import LMConfig, config
from fnrecipe.recipes.lm.data import stages, train_stream
from fnrecipe.streams import Form
from tests.data.laws import check_resumes, items, plain, take
from tests.recipes.streams import (
    DOCUMENTS,
    LENGTH,
    ONE_A_ROW,
    documents_of,
    expected_pieces,
    in_order,
    pieces,
    recipe,
    texts,
    train,
    valid,
    write,
    write_folder,
)

Make = Callable[[LMConfig], Source[Batch]]


@pytest.fixture
def folder(tmp_path: Path) -> DataSource:
    return write_folder(tmp_path / "corpus")


@pytest.mark.parametrize("stream", [train, valid])
@pytest.mark.parametrize("epochs", [1, 3])
def test_streams_resume(folder: DataSource, stream: Make, epochs: int) -> None:
    assert check_resumes(stream(recipe(folder, epochs=epochs, valid_fraction=0.4)), limit=25) >= 5


def test_an_endless_stream_of_two_sources_resumes(tmp_path: Path, folder: DataSource) -> None:
    other = write(tmp_path / "other.jsonl", texts(100, 115))
    source = train(recipe(folder, DataSource(other.path, weight=0.3), epochs=None))
    assert check_resumes(source, limit=20) == 20
    assert check_resumes(pipe(source, partial(prefetch, size=2)), limit=6) == 6


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_the_splits_share_the_documents_out(folder: DataSource, fraction: float) -> None:
    split = recipe(folder, max_seq_len=256, valid_fraction=fraction)
    training, validation = documents_of(items(train(split))), documents_of(items(valid(split)))
    assert not set(training) & set(validation)
    assert sorted(training + validation) == sorted(DOCUMENTS)
    assert bool(validation) == (fraction > 0)


def test_validation_sources_are_read_whole(tmp_path: Path, folder: DataSource) -> None:
    other = write(tmp_path / "other.jsonl", texts(100, 115))
    split = recipe(folder, max_seq_len=256, valid_sources=(other,))
    assert sorted(documents_of(items(train(split)))) == sorted(DOCUMENTS)
    validation = items(valid(split))
    assert sorted(documents_of(validation)) == sorted(texts(100, 115))
    assert {number for batch in validation for number in batch.sources[batch.mask].tolist()} == {1}


def test_a_validation_without_a_document_says_that_it_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = recipe(write(tmp_path / "book.jsonl", ["a" * 90]), valid_fraction=0.01)
    assert items(valid(book)) == []
    found = "found none but 1 for training (dataset.valid_fraction)"
    assert [record.getMessage() for record in caplog.records] == [f"book (validation): expected documents to use, {found}"]


def test_copies_of_a_document_fall_on_the_same_side(tmp_path: Path) -> None:
    split = recipe(write(tmp_path / "a.jsonl", texts(0, 30) * 3), max_seq_len=256, valid_fraction=0.5)
    sides = [Counter(documents_of(items(stream(split)))) for stream in (train, valid)]
    assert [set(side.values()) for side in sides] == [{3}, {3}]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("num_lanes", [1, 2, 4])
def test_epochs_give_every_prediction_once_each(folder: DataSource, num_lanes: int, epochs: int) -> None:
    found = Counter(pieces(items(train(recipe(folder, epochs=epochs, num_lanes=num_lanes)))))
    assert found == Counter({piece: epochs * count for piece, count in expected_pieces(DOCUMENTS).items()})


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_an_epoch_has_the_bytes_of_its_documents(folder: DataSource, packing: str) -> None:
    batches = items(train(recipe(folder, packing=packing)))
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == sum(len(text.encode()) for text in DOCUMENTS)


def test_no_target_is_of_another_document(tmp_path: Path) -> None:
    """Documents whose bytes are their own number."""
    numbered = write(tmp_path / "a.jsonl", [chr(i) * (2 + 7 * i % 30) for i in range(1, 128)])
    bare = recipe(numbered, ends=TokenizerSection(add_bos=False, add_eos=False), pack_window=16)
    batches = items(train(bare))
    assert all((batch.tokens == batch.targets)[batch.mask].all() for batch in batches)
    assert max(batch.segments.max() for batch in batches) > 1
    assert sum(batch.mask.sum() for batch in batches) == sum(1 + 7 * i % 30 for i in range(1, 128))


def test_concat_predicts_the_next_document_from_the_last_token(tmp_path: Path) -> None:
    sizes = [2 + 7 * i % 60 for i in range(1, 128)]
    numbered = write(tmp_path / "a.jsonl", [chr(i) * size for i, size in enumerate(sizes, 1)])
    ends = TokenizerSection(add_bos=False, add_eos=False)
    one_lane = {"num_lanes": 1, "batch_size": 1, "packing": "concat", "order": "sequential"}
    batches = items(train(recipe(numbered, ends=ends, **one_lane)))
    flat = [i for i, size in enumerate(sizes, 1) for _ in range(size)]
    start = 0
    for batch in batches:
        row = flat[start : start + LENGTH + 1]
        assert batch.tokens[batch.mask].tolist() == row[:-1]
        assert batch.targets[batch.mask].tolist() == row[1:]
        goes_on = flat[start + LENGTH : start + LENGTH + 2]
        start += LENGTH if len(set(goes_on)) == 1 else LENGTH + 1
    assert start >= len(flat) - 1
    assert sum(int((batch.tokens != batch.targets)[batch.mask].sum()) for batch in batches) > 100


@pytest.mark.parametrize("order", ["blocks", "documents"])
def test_epochs_differ_in_order(folder: DataSource, order: str) -> None:
    options = {**ONE_A_ROW, "order": order}
    both = in_order(recipe(folder, epochs=2, **options))
    first, second = both[: len(DOCUMENTS)], both[len(DOCUMENTS) :]
    assert sorted(first) == sorted(second) == sorted(DOCUMENTS)
    assert len({tuple(first), tuple(second), tuple(DOCUMENTS)}) == 3
    assert in_order(recipe(folder, epochs=1, **options)) == first


def test_a_sequential_stream_keeps_the_order_of_the_files_in_every_epoch(folder: DataSource) -> None:
    assert in_order(recipe(folder, epochs=3, order="sequential", **ONE_A_ROW)) == DOCUMENTS * 3


def test_validation_is_the_same_every_time_and_not_in_the_order_of_the_files(folder: DataSource) -> None:
    source = valid(recipe(folder, valid_fraction=0.5, **ONE_A_ROW))
    validation = documents_of(items(source))
    assert len(validation) > 10
    assert documents_of(items(source)) == validation
    assert validation != [text for text in DOCUMENTS if text in set(validation)]


def tiny_documents(path: Path) -> DataSource:
    return write(path, [f"{i:04d}" for i in range(400)])


def order_of(source: DataSource, seed: int = 2, **options: object) -> list[int]:
    return [int(text) for text in in_order(recipe(source, seed=seed, **ONE_A_ROW, **options))]


def neighbours(order: Sequence[int]) -> int:
    return sum(abs(a - b) == 1 for a, b in pairwise(order))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_documents_are_shuffled_over_the_whole_file(tmp_path: Path, seed: int) -> None:
    """A random permutation of n moves each by n / 3 on the average, and leaves about 2 pairs of neighbours."""
    order = order_of(tiny_documents(tmp_path / "a.jsonl"), seed, order="documents")
    displacement = sum(abs(place - number) for place, number in enumerate(order)) / 400
    assert abs(displacement - 400 / 3) < 20
    assert neighbours(order) < 12
    assert sorted(order) == list(range(400))


def test_blocks_keep_their_documents_together_without_a_window(tmp_path: Path) -> None:
    order = order_of(tiny_documents(tmp_path / "a.jsonl"), order="blocks", shuffle_window=1)
    assert neighbours(order) > 300
    assert order != sorted(order) == list(range(400))
    assert neighbours(order_of(tiny_documents(tmp_path / "a.jsonl"), order="blocks", shuffle_window=256)) < 40


@pytest.mark.parametrize("order", ["blocks", "documents"])
def test_an_order_depends_on_the_seed_alone(tmp_path: Path, order: str) -> None:
    first, again = (order_of(tiny_documents(tmp_path / name / "a.jsonl"), 5, order=order) for name in ("x", "y"))
    assert first == again != order_of(tiny_documents(tmp_path / "x" / "a.jsonl"), 6, order=order)


def shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    names = ("tokens", "targets", "segments", "positions", "sources", "mask", "num_bytes")
    return {name: getattr(batch, name).shape for name in names}


@pytest.mark.parametrize("stream", [train, valid])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_shapes_are_static(folder: DataSource, stream: Make, packing: str) -> None:
    batches = items(stream(recipe(folder, valid_fraction=0.4, packing=packing)))
    expected = dict.fromkeys(shapes(batches[0]), (4, LENGTH)) | {"num_bytes": (4,)}
    assert [shapes(batch) for batch in batches] == [expected] * len(batches)
    assert not batches[-1].mask.all()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_together_read_the_global_batches(folder: DataSource, world_size: int) -> None:
    endless = recipe(folder, epochs=None, batch_size=8, num_lanes=8)
    whole = [batch.tokens.tolist() for batch, _ in islice(train(endless)(None), 6)]
    parts = [take(train_stream(endless, LaneAssignment(rank, world_size)), None, 6) for rank in range(world_size)]
    assert [[row for part in parts for row in part[step][0]["tokens"][1]] for step in range(6)] == whole


THREE = ["a" * 50, "b" * 90, "c" * 70]


def test_a_file_of_three_documents_leaves_lanes_empty(tmp_path: Path) -> None:
    few = recipe(write(tmp_path / "few.jsonl", THREE), batch_size=8, num_lanes=8)
    batches = items(train(few))
    assert Counter(pieces(batches)) == expected_pieces(THREE)
    assert all(not batch.mask.any(axis=1).all() for batch in batches)


@pytest.mark.parametrize("documents", [THREE, texts(0, 12)])
def test_few_documents_are_all_there_in_every_epoch(tmp_path: Path, documents: Sequence[str]) -> None:
    few = recipe(write(tmp_path / "few.jsonl", documents), batch_size=8, num_lanes=8, epochs=5)
    found = Counter(pieces(items(train(few))))
    assert found == Counter({piece: 5 * count for piece, count in expected_pieces(documents).items()})


def test_few_documents_do_not_end_an_endless_stream(tmp_path: Path) -> None:
    few = recipe(write(tmp_path / "few.jsonl", THREE), batch_size=8, num_lanes=8, epochs=None)
    assert len(list(islice(train(few)(None), 200))) == 200


@pytest.mark.parametrize(("rows_of_a_book", "packed"), [(300, 1), (200, 2), (1, 32)])
def test_a_window_of_a_book_is_that_book_as_often_as_it_takes(tmp_path: Path, rows_of_a_book: int, packed: int) -> None:
    def counted(documents: Sequence[Tokens], index: int, **options: Any) -> Sequence[Row]:
        sizes.append(len(documents))
        return pack(documents, index, **options)

    sizes: list[int] = []
    source = write(tmp_path / "book.jsonl", ["a" * (rows_of_a_book * LENGTH - 1)])
    book = recipe(source, batch_size=8, num_lanes=8, epochs=None)
    next(streams.train_stream(book, LaneAssignment(), stages, Form(counted))(None))
    assert sizes == [packed]


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("stream", [train, valid])
def test_empty_documents_end_the_stream_at_once(tmp_path: Path, stream: Make, epochs: int | None) -> None:
    empty = recipe(write(tmp_path / "empty.jsonl", [""] * 20), epochs=epochs, valid_fraction=0.5)
    assert items(stream(empty)) == []


@pytest.mark.parametrize("order", ["blocks", "documents", "sequential"])
def test_empty_documents_are_left_out(tmp_path: Path, order: str) -> None:
    some = recipe(write(tmp_path / "some.jsonl", ["", "one", "", "two", ""]), order=order)
    assert Counter(pieces(items(train(some)))) == expected_pieces(["one", "two"])


def test_the_default_recipe_is_deterministic() -> None:
    first, second = (take(train(config), None, 3) for _ in range(2))
    assert first == second == take(pipe(train(config), partial(prefetch, size=2)), None, 3)
    assert len({json.dumps(plain(batch)) for batch, _ in first}) == 3


def test_the_seed_changes_the_order(folder: DataSource) -> None:
    assert pieces(items(train(recipe(folder, seed=3)))) != pieces(items(train(recipe(folder))))
