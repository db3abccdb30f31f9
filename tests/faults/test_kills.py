"""Runs that are killed again and again leave what an undisturbed run leaves; and the harness sees what it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.faults import harness, saves
from tests.faults.harness import KEEP, Run, check, committed, disturb, is_whole


@pytest.fixture(scope="module")
def truth(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "truth"
    Run(texts, out).finish()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_again_and_again_leaves_what_an_undisturbed_run_leaves(
    truth: Path, texts: Path, tmp_path: Path, seed: int
) -> None:
    statuses = list(disturb(Run(texts, tmp_path / "out"), truth, seed, kills=8))
    assert any(map(any, statuses)), "none was killed"


@pytest.mark.slow
def test_kills_at_random_moments_of_saves_beside_steps_lose_nothing(tmp_path: Path) -> None:
    steps = list(islice(saves.kills(tmp_path / "checkpoints", seed=0, seconds=0.3), 15))
    assert len(set(steps)) > 5, "no save was under way"


@pytest.mark.slow
def test_the_harness_finds_what_is_lost(truth: Path, tmp_path: Path) -> None:
    def lose_a_checkpoint(out: Path) -> None:
        shutil.rmtree(out / "checkpoints" / committed(out)[0])

    def tear_a_checkpoint(out: Path) -> None:
        (out / "checkpoints" / committed(out)[-1] / "state.json").write_text("{}")

    def double_a_step(out: Path) -> None:
        path = out / "metrics/train.jsonl"
        path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])

    def miss_a_step(out: Path) -> None:
        path = out / "metrics/train.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))

    def litter(out: Path) -> None:
        for number in range(4):
            (out / f"checkpoints/step_0000009{number}.tmp").mkdir()

    for number, harm in enumerate([lose_a_checkpoint, tear_a_checkpoint, double_a_step, miss_a_step, litter]):
        out = Path(shutil.copytree(truth, tmp_path / str(number)))
        newest = committed(out)[-1]
        seen = set(committed(out))
        assert check(out, seen, newest) == newest
        harm(out)
        with pytest.raises(AssertionError):
            check(out, seen, newest)


def make(out: Path, checkpoints: Sequence[str] = (), train: int = 0, valid: Sequence[int] = ()) -> Path:
    for name in checkpoints:
        (out / "checkpoints" / name).mkdir(parents=True)
    (out / "metrics").mkdir(parents=True)
    (out / "metrics/train.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, train + 1)) + '{"st')
    (out / "metrics/valid.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in valid))
    return out


OLD, NEW = "step_00000003", "step_00000006"


@pytest.mark.parametrize(
    ("moment", "left", "expected"),
    [
        (harness.saving, {"checkpoints": (OLD, f"{NEW}.tmp")}, True),
        (harness.saving, {"checkpoints": (f"{OLD}.tmp", NEW)}, False),
        (harness.pruning, {"checkpoints": (f"{OLD}.tmp", NEW)}, True),
        (harness.pruning, {"checkpoints": (OLD, f"{NEW}.tmp")}, False),
        (harness.saved, {"checkpoints": [f"step_0000000{number}" for number in range(KEEP + 1)]}, True),
        (harness.saved, {"checkpoints": [f"step_0000000{number}" for number in range(KEEP)]}, False),
        (harness.validating, {"train": 5}, True),
        (harness.validating, {"train": 6}, False),
        (harness.validating, {"train": 5, "valid": (5,)}, False),
        (harness.starting, {}, False),
    ],
)
def test_moments_are_seen_by_the_files(tmp_path: Path, moment: Callable[[Path], bool], left: Any, expected: bool) -> None:
    assert moment(make(tmp_path, **left)) == expected


def test_a_checkpoint_with_another_file_or_without_one_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    (tmp_path / "SHA256SUMS").write_text("982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1  a\n")
    assert is_whole(tmp_path)
    (tmp_path / "b").touch()
    assert not is_whole(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "a").write_text("test")
    assert not is_whole(tmp_path)
