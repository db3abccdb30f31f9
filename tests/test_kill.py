"""Whole runs in processes of their own: what is killed goes on as if nothing had been."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.helpers import end, last_step, pairs, remains, rows, signal_at, start

pytestmark = pytest.mark.slow


def test_a_run_killed_five_times_leaves_what_an_uninterrupted_run_leaves(
    uninterrupted: Path, texts: Path, tmp_path: Path
) -> None:
    command = ("train", "lm", "--out", str(tmp_path), "--config", *pairs(texts))
    for moment in sorted(random.Random(1).sample(range(1, 25), 5)):
        assert signal_at(start(*command), tmp_path, moment, signal.SIGKILL).status == -signal.SIGKILL
        assert moment <= last_step(tmp_path)
    finished = end(start(*command))
    assert (finished.status, finished.errors) == (0, "")
    assert "going on after step" in finished.output
    assert remains(tmp_path) == remains(uninterrupted)
    assert [row["step"] for row in rows(tmp_path / "metrics/train.jsonl")] == list(range(1, 31))
    assert [row["step"] for row in rows(tmp_path / "metrics/valid.jsonl")] == [7, 14, 21, 28, 30]


def test_a_run_that_is_not_finite_ends_with_status_3_and_a_message(texts: Path, tmp_path: Path) -> None:
    ended = end(start("train", "lm", "--out", str(tmp_path), "--config", *pairs(texts, optimizer__config__lr=1e30)))
    assert ended.status == 3
    (line,) = ended.errors.splitlines()
    bad = [row["step"] for row in rows(tmp_path / "metrics/train.jsonl") if row["skipped"]]
    assert line.startswith(f"error: step {bad[4]}: the loss or the gradient was not finite in 5 steps in a row")
