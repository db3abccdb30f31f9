"""`fnrecipe new` writes a recipe that trains and a test that passes, and nothing over what is there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fnrecipe.shell.trained.load import load
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here, python
from tests.helpers import pairs, rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Ended:
    return fnrecipe_here(monkeypatch, capsys, "new", *args)


def test_what_is_written_is_said_and_formatted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = new(monkeypatch, capsys, "ours")
    assert ended == Ended(0, "ours.py: fnrecipe train ours.py --out runs/ours\ntest_ours.py: pytest test_ours.py\n", "")
    assert sorted(path.name for path in here.iterdir()) == ["ours.py", "test_ours.py"]
    assert "NAME" not in "".join(path.read_text() for path in here.iterdir())
    for command in (["check", "--select", "B,E,F,I,N,RUF,UP,W"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "--target-version", "py311"]
        done = subprocess.run([*ruff, "ours.py", "test_ours.py"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["two-words", "a b", "1st", "", "mine.py", "../mine", "class", "a/b", "-"])
def test_what_python_cannot_import_is_no_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ended = new(monkeypatch, capsys, name)
    line = f"error: NAME: expected a name that Python can import (letters, digits and _), found {name!r}\n"
    assert ended == Ended(2, "", line)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["json", "torch", "transformers", "fnrecipe", "__main__"])
def test_the_name_of_a_module_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ended = new(monkeypatch, capsys, name)
    assert ended == Ended(2, "", f"error: NAME: expected one that no installed module has, found {name!r}\n")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["mine", "mine.py", "test_mine.py"])
def test_nothing_is_written_over(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (here / name).write_text("precious")
    assert new(monkeypatch, capsys, "mine") == Ended(2, "", f"error: {name}: expected a new name, found this there already\n")
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [(name, "precious")]


def test_a_folder_that_takes_no_files(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    ended = new(monkeypatch, capsys, "ours")
    assert ended == Ended(2, "", "error: ours.py: cannot write the file: Permission denied\n")


@pytest.mark.slow
def test_the_recipe_trains_by_its_own_key_and_its_test_passes(tmp_path: Path, texts: Path) -> None:
    assert fnrecipe("new", "mine", cwd=tmp_path).status == 0
    quick = {"regime__num_steps": 4, "trainer__jit": "off", "optimizer__config__lr": 0.01}
    settings = pairs(texts, **quick, lr_scheduler__config="{num_warmup_steps: 1, final_lr_scale: 0.5}")
    settings = [pair for pair in settings if not pair.startswith("lr_scheduler.config.")]
    wrong = fnrecipe("train", "mine.py", "--out", "out", "--config", *settings, "decay.fractoin=1", cwd=tmp_path)
    assert_usage_error(wrong, "decay.fractoin: expected a known key, found 'fractoin' (command line); did you mean fraction?")
    ended = fnrecipe("train", "mine.py", "--out", "out", "--config", *settings, "decay.fraction=0.5", cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    rates = [row["train/lr"] for row in rows(tmp_path / "out/metrics/train.jsonl")]
    assert rates == pytest.approx([0.01, 0.01, 0.0075, 0.005])
    assert load(tmp_path / "out").recipe.name == "mine"
    tested = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", cwd=tmp_path)
    assert tested.status == 0, tested.out
    assert "2 passed" in tested.out


@pytest.mark.slow
def test_the_commands_that_the_recipe_names_are_understood(tmp_path: Path) -> None:
    assert fnrecipe("new", "mine", cwd=tmp_path).status == 0
    lines = [line for line in (tmp_path / "mine.py").read_text().splitlines() if line.startswith("fnrecipe train ")]
    assert len(lines) == 2
    for line in lines:
        _, _, recipe, _, _, *config = shlex.split(line)
        ended = fnrecipe("dump-config", recipe, *config, cwd=tmp_path)
        assert (ended.status, ended.err) == (0, "")
        assert "decay:\n  fraction: " in ended.out
