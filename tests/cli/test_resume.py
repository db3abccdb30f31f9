"""`fnrecipe resume` and `--from-step`: runs that go on without their config, also from an older checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fnrecipe import checkpoint
from fnrecipe.config import resolve
from fnrecipe.errors import FnrecipeError
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell.find_recipe import find
from fnrecipe.shell.saving.aside import set_aside
from fnrecipe.shell.train import train
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here
from tests.helpers import pairs, remains

SHORT: dict[str, Any] = {
    "regime__num_steps": 6,
    "regime__checkpoint_every_n_steps": 2,
    "regime__keep_last_n_checkpoints": "null",
    "regime__validate_every_n_steps": 3,
    "dataset__prefetch": 0,
    "trainer__jit": "off",
}
Resume = Callable[..., Ended]


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing may change, with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("resume") / "whole"
    config, _ = resolve(recipe.config, (), pairs(texts, **SHORT))
    assert train(find("lm").load(), config, out) == 0
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Resume:
    return lambda *args: fnrecipe_here(monkeypatch, capsys, "resume", *args)


def steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_run_goes_on_without_its_config(resume: Resume, whole: Path, run: Path) -> None:
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoints/step_0000000{step}")
    ended = resume(run)
    assert (ended.status, ended.err) == (0, "")
    assert "going on after step 2" in ended.out
    assert remains(run) == remains(whole)


def test_what_train_allows_is_allowed_and_nothing_else(resume: Resume, run: Path) -> None:
    assert_usage_error(resume(run, "--config", "optimizer.config.lr=1"), "optimizer.config.lr: 0.0015 there, 1.0 now")
    ended = resume(run, "--config", "regime.num_steps=7")
    assert ended.status == 0
    assert "done: step 7, 1 steps" in ended.out
    assert resume(run).status == 0


def test_from_step_goes_back_and_newer_ones_become_a_run_of_their_own(resume: Resume, whole: Path, run: Path) -> None:
    ended = resume(run, "--from-step", "2")
    assert (ended.status, ended.err) == (0, "")
    assert "going on after step 2" in ended.out
    assert f"newer than step 2: set aside, with its records, as the run {run}/aside/1" in ended.out
    assert remains(run) == remains(whole)
    aside = run / "aside/1"
    assert steps(aside) == ["step_00000004", "step_00000006"]
    newer = {path: data for path, data in remains(whole).items() if "step_00000002" not in path and path != "sample.txt"}
    assert {path: (aside / path).read_bytes() for path in newer} == newer
    shutil.rmtree(aside / "checkpoints/step_00000006")
    ended = resume(aside)
    assert "going on after step 4" in ended.out
    assert {path: (aside / path).read_bytes() for path in newer} == newer


def test_train_goes_back_too(
    whole: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "aside/1").mkdir(parents=True)
    words = ("train", "lm", "--out", run, "--config-file", run / "config.yaml", "--from-step", "4")
    assert fnrecipe_here(monkeypatch, capsys, *words).status == 0
    assert remains(run) == remains(whole)
    assert steps(run / "aside/2") == ["step_00000006"]


def test_the_newest_step_sets_nothing_aside(resume: Resume, run: Path) -> None:
    assert resume(run, "--from-step", "6").status == 0
    assert not (run / "aside").exists()


def test_what_cannot_go_on_sets_nothing_aside(resume: Resume, whole: Path, run: Path) -> None:
    ended = resume(run, "--from-step", "3")
    assert (ended.status, ended.out) == (1, "")
    assert "expected a checkpoint of step 3, found those of 2, 4, 6" in ended.err
    path = run / "checkpoints/step_00000002/state_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    ended = resume(run, "--from-step", "2")
    assert ended.status == 1
    assert "expected a whole checkpoint, found a damaged one: state_0000.safetensors is not what SHA256SUMS says" in ended.err
    assert steps(run) == steps(whole)
    assert not (run / "aside").exists()


def test_the_model_of_a_checkpoint_alone_is_not_enough(resume: Resume, run: Path) -> None:
    checkpoint.prune(run / "checkpoints", checkpoint.Policy(last=1, every_n_steps=2, model_only=True))
    assert steps(run) == ["model_00000002", "model_00000004", "step_00000006"]
    ended = resume(run, "--from-step", "4")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "expected a checkpoint to go on from, found one that holds its model alone" in ended.err
    assert not (run / "aside").exists()


def test_whoever_is_killed_on_the_way_has_the_records_aside_and_the_older_ones_there(
    run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_at_four(path: Path, target: Path) -> Path:
        if path.name == "step_00000004":
            raise OSError("the end")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_four)
    with pytest.raises(FnrecipeError, match="cannot set aside what is newer than step 2: the end"):
        set_aside(run, 2)
    assert steps(run) == ["step_00000002", "step_00000004"]
    assert steps(run / "aside/1") == ["step_00000006"]
    assert (run / "aside/1/metrics/train.jsonl").read_bytes() == (whole / "metrics/train.jsonl").read_bytes()


def test_what_is_no_run_is_told(resume: Resume, run: Path, tmp_path: Path) -> None:
    assert_usage_error(resume(tmp_path), "expected the output directory of a run, found no run.json in it")
    assert_usage_error(resume(tmp_path / "nothing"), "expected the output directory of a run, found no directory")
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"origin": "lm"', '"origin": "lost.py"'))
    ended = resume(run)
    assert_usage_error(ended, "cannot find its recipe 'lm' again: lost.py: ", f"--config-file {run}/config.yaml")
    (run / "run.json").write_text(text)
    (run / "config.yaml").unlink()
    assert_usage_error(resume(run), "found no config.yaml in it")


def test_a_secret_that_was_not_written_has_to_be_given(resume: Resume, whole: Path, run: Path, texts: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"path: {texts}", "path: https://***@host/a.jsonl?token=***"))
    advice = "give the whole value by --config dataset.sources=..."
    assert_usage_error(resume(run), f"in dataset.sources, found one without its secret; {advice}")
    ended = resume(run, "--config", f"dataset.sources=[{{path: {texts}}}]", "--resume-with-changes")
    assert (ended.status, ended.err) == (0, "")
    assert (run / "config.yaml").read_text() == text


@pytest.mark.slow
def test_two_processes_go_back_together(whole: Path, run: Path) -> None:
    ended = fnrecipe("resume", run, "--from-step", "2", "--nproc", "2", cwd=run)
    assert ended.status == 0, ended
    assert ended.out.count("set aside") == 1
    assert remains(run) == remains(whole)
    assert steps(run / "aside/1") == ["step_00000004", "step_00000006"]
