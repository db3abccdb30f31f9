"""Batches that are smaller in the beginning: parts of batches that are read, at any place and number of ranks the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fnrecipe.config import RegimeSection, resolve
from fnrecipe.data.stream import Cursor
from fnrecipe.errors import ConfigError, DataError
from fnrecipe.recipes.lm.config import config
from fnrecipe.runtime.position import Position
from fnrecipe.shell.streams import in_parts, part_of_microbatches
from tests.helpers import end, pairs, remains, rows, start
from tests.shell.stages import before_batch
from tests.shell.test_train import train

REGIME = RegimeSection(num_steps=9, batch_size_schedule=((4, 2), (6, 4)))
SCHEDULE = {
    "regime__batch_size_schedule": "[[4, 2], [6, 4]]",
    "regime__num_steps": 9,
    "regime__checkpoint_every_n_steps": 3,
    "regime__keep_last_n_checkpoints": "null",
}


def numbered(cursor: Cursor = None) -> Iterator[tuple[Tensor, Position]]:
    for number in range(cursor or 0, 5):
        yield torch.arange(8 * number, 8 * number + 8), Position(number + 1, waited=0.5)


def parts(made: int, cursor: Cursor = None) -> list[tuple[list[int], Cursor]]:
    cut = partial(part_of_microbatches, num_microbatches=2)
    stream = in_parts(numbered, cursor, made=made, part=partial(REGIME.part, batch_size=8), cut=cut)
    return [(rows.tolist(), position.cursor) for rows, position in stream]


def test_each_step_takes_its_rows_of_every_microbatch() -> None:
    assert parts(0) == [
        ([0, 4], None),
        ([1, 5], None),
        ([2, 6], None),
        ([3, 7], 1),
        ([8, 9, 12, 13], 1),
        ([10, 11, 14, 15], 2),
        (list(range(16, 24)), 3),
        (list(range(24, 32)), 4),
        (list(range(32, 40)), 5),
    ]


def test_from_the_cursor_of_any_step_the_rest_is_the_same() -> None:
    found = parts(0)
    for made, (_, cursor) in enumerate(found, 1):
        assert parts(made, cursor) == found[made:]


def test_a_batch_is_waited_for_once() -> None:
    stream = in_parts(numbered, made=0, part=partial(REGIME.part, batch_size=8), cut=lambda batch, *part: batch)
    assert [position.waited for _, position in stream] == [0.5, 0, 0, 0, 0.5, 0, 0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batch_size") / "whole"
    assert train(texts, out, **SCHEDULE) == 0
    return out


def test_steps_use_what_batches_have_and_no_more(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, regime__num_steps=5) == 0
    full, found = ([row["train/targets"] for row in rows(out / "metrics/train.jsonl")] for out in (tmp_path, whole))
    assert [sum(found[:4]), sum(found[4:6]), *found[6:]] == full
    speeds = [row for row in rows(whole / "logs/perf.jsonl") if row["step"] == 9]
    assert speeds[0]["perf/positions_per_second"] == pytest.approx(8 * 32 * speeds[0]["perf/steps_per_second"])


@pytest.mark.parametrize("batch", [2, 3])
def test_a_run_goes_on_within_a_batch(whole: Path, texts: Path, tmp_path: Path, batch: int) -> None:
    """It fails before the second batch, behind step 4, or the third, behind step 6, and goes on from steps 3 and 6."""

    def fail() -> None:
        raise DataError("a.jsonl:3: bad")

    with pytest.raises(DataError):
        train(texts, tmp_path / "out", before_batch(batch, fail), **SCHEDULE)
    assert train(texts, tmp_path / "out", **SCHEDULE) == 0
    assert remains(tmp_path / "out") == remains(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
def test_two_ranks_train_on_the_same_parts(whole: Path, texts: Path, tmp_path: Path, sharding: str) -> None:
    given = pairs(texts, **SCHEDULE, dataset__prefetch=0, gang__sharding=sharding)
    ended = end(start("train", "lm", "--nproc", "2", "--out", str(tmp_path / "out"), "--config", *given))
    assert ended.status == 0, ended.errors
    assert rows(tmp_path / "out/metrics/train.jsonl") == rows(whole / "metrics/train.jsonl")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            "[[4, 3]]",
            "regime.batch_size_schedule[0][1]: expected rows that are a multiple of gang.num_microbatches = 2 that divide "
            "dataset.batch_size = 8, found 3",
        ),
        (
            "[[3, 2]]",
            "regime.batch_size_schedule[0][0]: expected 0 and a multiple of 4, the steps of 2 rows that use up a batch, found",
        ),
        (
            "[[4, 2], [5, 4]]",
            "regime.batch_size_schedule[1][0]: expected 4 and a multiple of 2, the steps of 4 rows that use up a batch, found",
        ),
        ("[[4, 2], [2, 4]]", "regime.batch_size_schedule[1][0]: expected 4 and a multiple of 2"),
    ],
)
def test_what_does_not_use_up_batches_is_told(schedule: str, message: str) -> None:
    given = [f"regime.batch_size_schedule={schedule}", "dataset.batch_size=8", "gang.num_microbatches=2"]
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(config, [], given)
