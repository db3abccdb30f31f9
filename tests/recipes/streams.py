"""What the tests of the recipe's stream share: documents, files, configs of few lanes, and batches read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from fnrecipe.config import DatasetSection, DataSource, RegimeSection, TokenizerSection
from fnrecipe.data import Batch, LaneAssignment, Source
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import train_stream, valid_stream
from tests.data.laws import items

END = 256
LENGTH = 32

Piece = tuple[int, ...]


def texts(start: int, stop: int) -> list[str]:
    """Documents that are all different: of 3 to 126 bytes, some of them of many bytes a character."""
    return [f"<{i}>" + "größe 東京都 🙂 abc "[i % 7 :] * (i % 5) for i in range(start, stop)]


FILES = {"a.jsonl": texts(0, 40), "b.jsonl": texts(40, 41), "sub/c.jsonl": texts(41, 60), "sub/tiny.jsonl": ["x"]}
DOCUMENTS = [text for name in FILES for text in FILES[name]]
ONE_A_ROW: Mapping[str, Any] = {"max_seq_len": 256, "batch_size": 1, "num_lanes": 1, "pack_window": 1}


def lines(documents: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


def write(path: Path, documents: Iterable[str]) -> DataSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(documents), encoding="utf-8")
    return DataSource(str(path))


def write_folder(path: Path) -> DataSource:
    """The files of FILES below a path."""
    for name, documents in FILES.items():
        write(path / name, documents)
    return DataSource(str(path))


def recipe(
    *sources: DataSource, epochs: int | None = 1, ends: TokenizerSection | None = None, seed: int = 2, **options: Any
) -> LMConfig:
    """Two lanes of two short rows, unless `options` of the dataset say otherwise."""
    small = {"max_seq_len": LENGTH, "batch_size": 4, "num_lanes": 2, "pack_window": 4, "valid_fraction": 0.0}
    dataset = DatasetSection(sources=sources, **(small | options))
    made = LMConfig(
        dataset=dataset, tokenizer=ends or TokenizerSection(), regime=RegimeSection(num_steps=1, num_data_epochs=epochs)
    )
    return attrs.evolve(made, common=attrs.evolve(made.common, seed=seed))


def train(config: LMConfig) -> Source[Batch]:
    return train_stream(config, LaneAssignment())


def valid(config: LMConfig) -> Source[Batch]:
    return valid_stream(config, LaneAssignment())


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


def in_order(config: LMConfig) -> list[str]:
    """The documents of a stream whose rows hold one document each."""
    return documents_of(items(train(config)))


def token_counts(batches: Sequence[Batch], num_lanes: int, names: str) -> list[list[Counter[str]]]:
    """For each lane the tokens of each source after each of its rows, where a row is a document: a prediction each, and one."""
    counted = []
    for lane in range(num_lanes):
        used: Counter[str] = Counter(dict.fromkeys(names, 0))
        after = []
        for batch in batches:
            if batch.mask[lane].any():
                used[names[batch.sources[lane].max()]] += int(batch.mask[lane].sum()) + 1
                after.append(used.copy())
        counted.append(after)
    return counted
