"""`fnrecipe checkpoint prune` and `copy`: what goes, what comes, and what must not."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe import checkpoint
from fnrecipe.checkpoint import damage as damages
from fnrecipe.config import RegimeSection, unstructure, yaml
from fnrecipe.runtime.remote import remote_directory
from tests.checkpoints import silent, small_state
from tests.cli.helpers import Verb, assert_usage_error
from tests.cli.test_checkpoint import cells, damage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory as of a run, with checkpoints of steps 10, 20, … 60, and losses that are least at 20."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for step in range(10, 70, 10):
        checkpoint.save(out / "checkpoints", step, small_state(float(step)), None, {})
    (out / "metrics").mkdir()
    losses = [{"step": step, "valid/loss": abs(step - 20) + 1.0} for step in range(10, 70, 10)]
    (out / "metrics/valid.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in losses))
    for name in ("products.json", "rollbacks.jsonl"):
        (out / name).write_text("{}")
    (out / "run.json").write_text('{"recipe": "lm", "origin": "lm"}')
    config(out)
    return out


def config(out: Path, **regime: Any) -> None:
    section = attrs.evolve(RegimeSection(num_steps=60), **regime)
    (out / "config.yaml").write_text(yaml.dump({"common": {"seed": 1}, "regime": unstructure(section)}))


def steps(out: Path) -> list[int]:
    return [step for path in checkpoint.committed(out / "checkpoints") if (step := checkpoint.step_of(path)) is not None]


@pytest.mark.parametrize(
    ("regime", "words", "left"),
    [
        ({}, [], [40, 50, 60]),
        ({"keep_last_n_checkpoints": None}, [], [10, 20, 30, 40, 50, 60]),
        ({"keep_last_n_checkpoints": None}, ["--keep-last", "2"], [50, 60]),
        ({}, ["--keep-last", "1", "--keep-every", "30"], [30, 60]),
        ({"keep_best_n_checkpoints": 1}, ["--keep-last", "1"], [20, 60]),
    ],
)
def test_prune_keeps_what_the_config_or_the_command_says(
    verb: Verb, run: Path, regime: dict[str, Any], words: list[str], left: list[int]
) -> None:
    config(run, **regime)
    ended = verb("prune", run, *words, "--dry-run")
    assert ended.status == 0
    assert steps(run) == [10, 20, 30, 40, 50, 60]
    again = verb("prune", run, *words)
    assert again.out == ended.out.replace("would be ", "")
    assert steps(run) == left
    gone = [f"step {step}: removed, 1.9 kB" for step in range(10, 70, 10) if step not in left]
    assert again.out.splitlines() == [*gone, f"kept: {', '.join(map(str, left))}; every byte of 60 verified"]


def test_prune_never_removes_the_last_whole_one(verb: Verb, run: Path) -> None:
    for step in (40, 50, 60):
        damage(run / f"checkpoints/step_000000{step}")
    ended = verb("prune", run, "--keep-last", "1", "--dry-run")
    assert ended.out.splitlines()[-1] == "kept: 30; every byte of 30 verified"
    assert ended.err.count("damaged checkpoint passed over") == 3
    assert verb("prune", run, "--keep-last", "1").status == 0
    assert steps(run) == [30]
    assert checkpoint.newest(run / "checkpoints", silent) is not None
    damage(run / "checkpoints/step_00000030")
    ended = verb("prune", run)
    assert (ended.status, steps(run)) == (1, [30])
    assert "every checkpoint is damaged" in ended.err


def test_prune_keeps_models_alone_where_the_config_says_so(verb: Verb, run: Path) -> None:
    config(run, keep_last_n_checkpoints=2, keep_best_n_checkpoints=2, keep_model_only=True)
    ended = verb("prune", run)
    assert ended.out.splitlines()[-1] == "kept as models alone: 10, 20"
    assert [path.name for path in checkpoint.models(run / "checkpoints")] == ["model_00000010", "model_00000020"]
    listed = verb("list", run).out
    assert [cells(listed, step)[-2:] for step in ("20", "60")] == [["best 2", "its model alone"], ["last", "whole"]]


def test_list_says_why_each_is_kept(verb: Verb, run: Path) -> None:
    config(run, keep_last_n_checkpoints=2, keep_checkpoint_every_n_steps=30, keep_best_n_checkpoints=1)
    listed = verb("list", run).out
    kept = [cells(listed, str(step))[-2] for step in range(10, 70, 10)]
    assert kept == ["", "best 1", "every 30", "", "last", "last, every 30"]


def test_prune_waits_for_nobody_and_spoils_no_run(verb: Verb, run: Path, tmp_path: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_usage_error(verb("prune", run), "another run (process unknown) is writing here")
    assert len(steps(run)) == 6
    shutil.copytree(run / "checkpoints", tmp_path / "alone")
    assert_usage_error(verb("prune", tmp_path / "alone"), "expected the output directory of a run, found no config.yaml in it")


def files(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("link", [False, True])
def test_copy_makes_a_run(verb: Verb, run: Path, tmp_path: Path, link: bool) -> None:
    words = ["--link"] if link else []
    ended = verb("copy", run, tmp_path / "other", "--step", "20", "--step", "60", *words)
    assert ended.status == 0
    verbs = "linked" if link else "copied"
    assert [line.split(": ")[1] for line in ended.out.splitlines()] == [f"{verbs} and read back"] * 2
    kept = {name: data for name, data in files(run).items() if not any(f"000000{step}" in name for step in (10, 30, 40, 50))}
    assert files(tmp_path / "other") == kept
    path = "checkpoints/step_00000060/state_0000.safetensors"
    assert (run / path).samefile(tmp_path / "other" / path) == link
    assert (run / path).stat().st_mtime_ns == (tmp_path / "other" / path).stat().st_mtime_ns
    assert verb("copy", run / "checkpoints/step_00000030", tmp_path / "other").status == 0
    assert verb("copy", run, tmp_path / "other").status == 0
    assert steps(tmp_path / "other") == [20, 30, 60]


def test_copy_takes_records_that_are_further_alone(verb: Verb, run: Path, tmp_path: Path) -> None:
    assert verb("copy", run, tmp_path / "other").status == 0
    theirs = tmp_path / "other/metrics/valid.jsonl"
    further = theirs.read_text() + '{"step": 70, "valid/loss": 0.5}\n'
    theirs.write_text(further)
    assert verb("copy", run, tmp_path / "other", "--step", "10").status == 0
    assert theirs.read_text() == further


def test_copy_leaves_nothing_where_it_fails(verb: Verb, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(run / "checkpoints/step_00000010")
    ended = verb("copy", run, tmp_path / "other", "--step", "10")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "expected a whole checkpoint, found a damaged one: state_0000.safetensors is not what" in ended.err
    real = shutil.copyfile

    def torn(source: Path, target: Path, **options: Any) -> Any:
        real(source, target, **options)
        if target.suffix == ".safetensors":
            target.write_bytes(target.read_bytes()[:-1] + b"\x01")
        return target

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", torn)
        ended = verb("copy", run, tmp_path / "other")
    assert "found a damaged copy: state_0000.safetensors is not what SHA256SUMS says" in ended.err

    def full(source: Path, target: Path, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        ended = verb("copy", run, tmp_path / "other")
    assert ended.err.endswith("step_00000060: cannot copy the checkpoint: No space left on device\n")

    def other_disk(source: Path, target: Path, **options: Any) -> Any:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", other_disk)
        ended = verb("copy", run, tmp_path / "other", "--link")
    assert "hard links do not lead to another file system; leave out --link" in ended.err
    assert list((tmp_path / "other/checkpoints").iterdir()) == []
    assert not (tmp_path / "other/config.yaml").exists()


def test_copy_mixes_no_two_runs(verb: Verb, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    checkpoint.save(run / "checkpoints", 70, small_state(70.0), None, {})
    checkpoint.save(other / "checkpoints", 70, small_state(71.0), None, {})
    ended = verb("copy", run, other)
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "expected no checkpoint, or the same one, found another one of its step" in ended.err
    config(other, checkpoint_every_n_steps=7)
    assert_usage_error(verb("copy", run, other), "the same run, found one with another regime.checkpoint_every_n_steps")
    assert damages.problem(other / "checkpoints/step_00000070", 70, every_byte=True) == ""


def test_copy_goes_to_an_address_and_comes_back(verb: Verb, run: Path, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/run"
    ended = verb("copy", run, address, "--step", "20", "--step", "60")
    assert (ended.status, ended.out.count(": copied and read back\n")) == (0, 2)
    assert verb("copy", address, tmp_path / "other").status == 0
    assert verb("copy", f"{address}/checkpoints/step_00000020/", tmp_path / "other").status == 0
    kept = {name: data for name, data in files(run).items() if not any(f"000000{step}" in name for step in (10, 30, 40, 50))}
    assert files(tmp_path / "other") == kept
    assert verb("copy", tmp_path / "other", f"file://{tmp_path}/third", "--link").status == 0


def test_copy_from_an_address_passes_over_what_is_damaged_and_mixes_no_two_runs(verb: Verb, run: Path, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/run"
    there = remote_directory(address)
    assert verb("copy", run, address, "--step", "20", "--step", "60").status == 0
    there.write("checkpoints/step_00000060/state.json", io.BytesIO(b"{}"))
    ended = verb("copy", address, tmp_path / "other")
    assert (ended.status, steps(tmp_path / "other")) == (0, [20])
    assert "step_00000060: expected a whole checkpoint, found a damaged copy: state.json is not what" in ended.err
    assert verb("copy", address, tmp_path / "other", "--step", "60").status == 1
    assert_usage_error(verb("copy", address, tmp_path / "other", "--step", "7"), "of step 7, found those of 20, 60")
    assert_usage_error(verb("copy", f"{address}s", tmp_path / "new"), "a run with checkpoints that are complete, found none")
    assert_usage_error(verb("copy", address, address), "since the run is at an address, found another address")
    assert_usage_error(verb("copy", run, address, "--link"), "--link: expected two directories of this machine")
    config(run, checkpoint_every_n_steps=7)
    assert_usage_error(verb("copy", run, address), "the same run, found one with another regime.checkpoint_every_n_steps")
    assert not (tmp_path / "new").exists()
