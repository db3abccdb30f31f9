"""`fnrecipe lr-find`: it goes on where a run or a recipe begins, and leaves what it looks at as it was."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, fnrecipe_here
from tests.helpers import pairs

LrFind = Callable[..., Ended]


@pytest.fixture
def lr_find(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> LrFind:
    """Sweeps, in this process."""
    return lambda *args: fnrecipe_here(monkeypatch, capsys, "lr-find", *args)


def contents(root: Path) -> dict[Path, tuple[bytes, int]]:
    """Bytes and time of each file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(root.rglob("*")) if path.is_file()}


def losses(out: Path) -> list[float]:
    with (out / "lr_find.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def trained(run: Path, step: int) -> float:
    """The loss that training had in a step."""
    rows = map(json.loads, (run / "metrics/train.jsonl").read_text().splitlines())
    (found,) = (row["train/loss"] for row in rows if row["step"] == step)
    return float(found)


def test_a_run_goes_on_from_its_checkpoint_and_is_left_as_it_was(lr_find: LrFind, uninterrupted: Path, tmp_path: Path) -> None:
    before = contents(uninterrupted)
    out = tmp_path / "sweep"
    ended = lr_find(uninterrupted, "--out", out, "--step", "28", "--start", "1e-9", "--end", "1e-8", "--steps", "4")
    assert ended.status == 0, ended.err
    assert contents(uninterrupted) == before
    assert losses(out)[0] == pytest.approx(trained(uninterrupted, 29), rel=1e-6)
    assert len(losses(out)) == 4
    assert sorted(path.name for path in out.iterdir()) == ["lr_find.csv", "lr_find.svg"]
    assert re.search(r"^steepest +[\d.e-]+ ", ended.out, re.MULTILINE)
    assert f"did not diverge up to 1e-08; {out / 'lr_find.csv'}, {out / 'lr_find.svg'}" in ended.out


def test_a_recipe_begins_as_its_training_does_and_diverges(
    lr_find: LrFind, texts: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    ended = lr_find("lm", "--out", tmp_path, "--steps", "40", "--end", "1e4", "--config", *pairs(texts), "trainer.jit=off")
    assert ended.status == 0, ended.err
    assert "40 steps at rates from 1.5e-06 to 1e+04; the config has 0.0015\n" in ended.err
    assert losses(tmp_path)[0] == pytest.approx(trained(uninterrupted, 1), rel=1e-6)
    assert re.search(r"^diverged at [\d.e+]+; ", ended.out, re.MULTILINE)
    lowest = float(re.findall(r"loss is least, ([\d.e+-]+)$", ended.out, re.MULTILINE)[0])
    assert 1e-4 < lowest < 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lm", "--step", "3"], "--step: expected the directory of a run, found lm"),
        (["lm", "--start", "1", "--end", "0.5"], "--end: expected a rate above the first one, 1, found 0.5"),
        (["lmm"], "lmm: no such recipe; did you mean lm? (or path/to/recipe.py, or module:attribute)"),
    ],
)
def test_wrong_usage_is_told(lr_find: LrFind, tmp_path: Path, args: list[str], message: str) -> None:
    ended = lr_find(*args, "--out", tmp_path / "out")
    assert (ended.status, ended.out) == (2, "")
    assert f"error: {message}" in ended.err
    assert not (tmp_path / "out").exists()
