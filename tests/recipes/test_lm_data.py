from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe.config import DatasetSection, DataSource, RegimeSection
from fnrecipe.data import Batch, Place, Source, pipe, prefetch
from fnrecipe.recipes.lm.config import LMConfig, config
from fnrecipe.recipes.lm.data import train_stream, valid_stream
from tests.data.laws import check_resumes, items, plain, take

END = 256
LENGTH = 32

Piece = tuple[int, ...]


def texts(start: int, stop: int) -> list[str]:
    """Documents that are all different: of 6 to 126 bytes, some of them of many bytes a character."""
    return [f"<{i}>" + "größe 東京都 🙂 abc "[i % 7 :] * (i % 5) for i in range(start, stop)]


FILES = {"a.jsonl": texts(0, 40), "b.jsonl": texts(40, 41), "sub/c.jsonl": texts(41, 60), "sub/tiny.jsonl": ["x"]}
DOCUMENTS = [text for name in FILES for text in FILES[name]]


def write(path: Path, documents: Iterable[str]) -> DataSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return DataSource(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> DataSource:
    for name, documents in FILES.items():
        write(tmp_path / "corpus" / name, documents)
    return DataSource(str(tmp_path / "corpus"))


def recipe(*sources: DataSource, epochs: int | None = 1, **options: Any) -> LMConfig:
    """Two lanes of two short rows, unless `options` of the dataset say otherwise."""
    small = {"max_seq_len": LENGTH, "batch_size": 4, "num_lanes": 2, "pack_window": 4, "valid_fraction": 0.0}
    dataset = DatasetSection(family="jsonl", sources=sources, **(small | options))
    return LMConfig(dataset=dataset, regime=RegimeSection(num_steps=1, num_data_epochs=epochs))


def train(config: LMConfig) -> Source[Batch]:
    return train_stream(config, Place())


def valid(config: LMConfig) -> Source[Batch]:
    return valid_stream(config, Place())


def pieces(batches: Iterable[Batch]) -> list[Piece]:
    """The ids of every piece, read out of batches: one more than it has predictions."""
    found = []
    for batch in batches:
        for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments, strict=True):
            for segment in range(segments.max() + 1):
                ids = [*tokens[segments == segment].tolist(), int(targets[segments == segment][-1])]
                assert ids[1:] == targets[segments == segment].tolist()
                found.append(tuple(ids))
    return found


def expected_pieces(documents: Iterable[str], length: int = LENGTH) -> Counter[Piece]:
    found: Counter[Piece] = Counter()
    for text in filter(None, documents):
        ids = (END, *text.encode(), END)
        found.update(ids[start : start + length + 1] for start in range(0, len(ids) - 1, length))
    return found


def documents_of(batches: Iterable[Batch]) -> list[str]:
    """The documents, where none is longer than a row."""
    whole = pieces(batches)
    assert all(piece[0] == piece[-1] == END and END not in piece[1:-1] for piece in whole)
    return [bytes(piece[1:-1]).decode() for piece in whole]


@pytest.mark.parametrize("stream", [train, valid])
@pytest.mark.parametrize("epochs", [1, 3])
def test_streams_resume(folder: DataSource, stream: Callable[[LMConfig], Source[Batch]], epochs: int) -> None:
    assert check_resumes(stream(recipe(folder, epochs=epochs, valid_fraction=0.4)), limit=25) >= 5


def test_an_endless_stream_of_two_sources_resumes(tmp_path: Path, folder: DataSource) -> None:
    other = write(tmp_path / "other.jsonl", texts(100, 115))
    source = train(recipe(folder, DataSource(other.path, 0.3), epochs=None))
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
    assert sorted(documents_of(items(valid(split)))) == sorted(texts(100, 115))


def test_copies_of_a_document_fall_on_the_same_side(tmp_path: Path) -> None:
    split = recipe(write(tmp_path / "a.jsonl", texts(0, 30) * 3), max_seq_len=256, valid_fraction=0.5)
    sides = [Counter(documents_of(items(stream(split)))) for stream in (train, valid)]
    assert [set(side.values()) for side in sides] == [{3}, {3}]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("num_lanes", [1, 2, 4])
def test_epochs_give_every_prediction_once_each(folder: DataSource, num_lanes: int, epochs: int) -> None:
    found = Counter(pieces(items(train(recipe(folder, epochs=epochs, num_lanes=num_lanes)))))
    assert found == Counter({piece: epochs * count for piece, count in expected_pieces(DOCUMENTS).items()})


def test_an_epoch_has_the_bytes_of_its_documents(folder: DataSource) -> None:
    batches = items(train(recipe(folder)))
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == sum(len(text.encode()) for text in DOCUMENTS)


def in_order(config: LMConfig) -> list[str]:
    """The documents of a stream of one lane whose rows hold one document each."""
    return documents_of(items(train(config)))


def test_epochs_differ_in_order(folder: DataSource) -> None:
    single = {"max_seq_len": 256, "batch_size": 1, "num_lanes": 1, "pack_window": 1}
    order = in_order(recipe(folder, epochs=2, **single))
    first, second = order[: len(DOCUMENTS)], order[len(DOCUMENTS) :]
    assert sorted(first) == sorted(second) == sorted(DOCUMENTS)
    assert len({tuple(first), tuple(second), tuple(DOCUMENTS)}) == 3
    assert in_order(recipe(folder, epochs=1, **single)) == first


def test_validation_keeps_the_order_of_the_files(folder: DataSource) -> None:
    single = {"max_seq_len": 256, "batch_size": 1, "num_lanes": 1, "pack_window": 1}
    validation = documents_of(items(valid(recipe(folder, valid_fraction=0.5, **single))))
    assert len(validation) > 10
    assert validation == [text for text in DOCUMENTS if text in set(validation)]


def test_sources_get_their_shares_of_the_tokens(tmp_path: Path) -> None:
    sizes = [1 + 17 * i % 60 for i in range(80)]
    a, b = (write(tmp_path / f"{name}.jsonl", [name * size for size in sizes]) for name in "ab")
    shares = recipe(
        DataSource(a.path, 0.7), DataSource(b.path, 0.3), epochs=None, max_seq_len=64, batch_size=2, pack_window=1, num_lanes=2
    )
    batches = [batch for batch, _ in islice(train(shares)(None), 150)]
    for lane in range(2):
        used = Counter({"a": 0, "b": 0})
        for batch in batches:  # a row is a document, so that every prefix is seen
            row = batch.targets[lane]
            used[chr(row[0])] += int(batch.mask[lane].sum()) + 1
            assert abs(used["a"] - 0.7 * used.total()) <= max(sizes) + 2
        assert used.total() > 2000


def test_an_exhausted_source_leaves_the_others(tmp_path: Path, folder: DataSource) -> None:
    short = write(tmp_path / "short.jsonl", texts(100, 103))
    found = Counter(pieces(items(train(recipe(folder, short)))))
    assert found == expected_pieces(DOCUMENTS + texts(100, 103))


def shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: getattr(batch, name).shape for name in ("tokens", "targets", "segments", "positions", "mask", "num_bytes")}


@pytest.mark.parametrize("stream", [train, valid])
def test_shapes_are_static(folder: DataSource, stream: Callable[[LMConfig], Source[Batch]]) -> None:
    batches = items(stream(recipe(folder, valid_fraction=0.4)))
    expected = dict.fromkeys(shapes(batches[0]), (4, LENGTH)) | {"num_bytes": (4,)}
    assert [shapes(batch) for batch in batches] == [expected] * len(batches)
    assert not batches[-1].mask.all()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_together_read_the_global_batches(folder: DataSource, world_size: int) -> None:
    endless = recipe(folder, epochs=None, batch_size=8, num_lanes=8)
    whole = [batch.tokens.tolist() for batch, _ in islice(train(endless)(None), 6)]
    parts = [take(train_stream(endless, Place(rank, world_size)), None, 6) for rank in range(world_size)]
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


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("stream", [train, valid])
def test_empty_documents_end_the_stream_at_once(
    tmp_path: Path, stream: Callable[[LMConfig], Source[Batch]], epochs: int | None
) -> None:
    empty = recipe(write(tmp_path / "empty.jsonl", [""] * 20), epochs=epochs, valid_fraction=0.5)
    assert items(stream(empty)) == []


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    some = recipe(write(tmp_path / "some.jsonl", ["", "one", "", "two", ""]))
    assert Counter(pieces(items(train(some)))) == expected_pieces(["one", "two"])


def test_the_default_recipe_is_deterministic() -> None:
    first, second = (take(train(config), None, 3) for _ in range(2))
    assert first == second == take(pipe(train(config), partial(prefetch, size=2)), None, 3)
    assert len({json.dumps(plain(batch)) for batch, _ in first}) == 3


def test_the_seed_changes_the_order(folder: DataSource) -> None:
    changed = attrs.evolve(recipe(folder), common=attrs.evolve(config.common, seed=config.common.seed + 1))
    assert pieces(items(train(changed))) != pieces(items(train(recipe(folder))))
