"""Old checkpoints go, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import checkpoint
from fnrecipe.errors import CheckpointError
from tests.checkpoints import sign


def save(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(root, step, {"x": torch.tensor(step)}, None, {})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory of checkpoints of steps 10 and 20."""
    save(tmp_path, 10, 20)
    return tmp_path


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def newest_step(root: Path) -> int:
    found = checkpoint.newest(root, lambda text: None)
    assert found is not None
    assert checkpoint.restore(found, {"x": torch.tensor(0)})["x"] == found.step
    return found.step


class Killed(BaseException):
    """The end of a process, as far as files go: nothing after it runs but `finally`."""


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    steps = (5, 99, 100, 1000)
    save(tmp_path, *steps)
    checkpoint.prune(tmp_path, checkpoint.Policy(last=keep))
    assert names(tmp_path) == {f"step_{step:08d}" for step in steps[-keep:]}


def test_prune_removes_what_a_killed_process_left(two: Path) -> None:
    (two / "step_00000030.tmp").mkdir()
    (two / "step_00000030.tmp/state_0000.safetensors").write_bytes(b"half")
    checkpoint.prune(two, checkpoint.Policy(last=2))
    assert names(two) == {"step_00000010", "step_00000020"}


def test_prune_passes_over_files_and_links_that_end_in_tmp(two: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "canary").touch()
    (two / "step_notes.tmp").write_text("a file")
    (two / "step_00000007.tmp").symlink_to(elsewhere)
    checkpoint.prune(two, checkpoint.Policy(last=1))
    assert "step_00000010" not in names(two)
    assert (elsewhere / "canary").exists()


def test_a_kill_in_the_middle_of_prune_leaves_no_half_checkpoint(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(place: Path, *args: Any, **options: Any) -> None:
        (place / "state.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            checkpoint.prune(two, checkpoint.Policy(last=1))
    assert [place.name for place in checkpoint.committed(two)] == ["step_00000020"]
    checkpoint.prune(two, checkpoint.Policy(last=1))
    assert names(two) == {"step_00000020"}


def damage(place: Path, name: str = "state_0000.safetensors") -> None:
    (place / name).write_bytes(b"half")


@pytest.mark.parametrize("name", ["state_0000.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_does_not_count_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    save(tmp_path, 10, 20, 30, 40)
    damage(tmp_path / "step_00000020", name)
    checkpoint.prune(tmp_path, checkpoint.Policy(last=3))
    assert names(tmp_path) == {"step_00000010", "step_00000020.damaged", "step_00000030", "step_00000040"}
    (record,) = caplog.records
    assert "step_00000020: damaged checkpoint set aside: " in record.getMessage()


def test_of_damaged_checkpoints_the_newest_is_kept(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 9))
    for step in (2, 5, 7):
        damage(tmp_path / f"step_{step:08d}")
    os.utime(tmp_path / "step_00000002", (2**33, 2**33))
    checkpoint.prune(tmp_path, checkpoint.Policy(last=2))
    assert names(tmp_path) == {"step_00000006", "step_00000007.damaged", "step_00000008"}
    checkpoint.prune(tmp_path, checkpoint.Policy(last=2))
    assert names(tmp_path) == {"step_00000006", "step_00000007.damaged", "step_00000008"}


def test_the_one_set_aside_last_is_kept_whatever_its_step(two: Path) -> None:
    damage(two / "step_00000020")
    checkpoint.tidy(two, 10)
    save(two, 12)
    damage(two / "step_00000012")
    checkpoint.tidy(two, 10)
    assert names(two) == {"step_00000010", "step_00000012.damaged"}


def test_the_disk_does_not_fill_with_checkpoints_that_are_damaged_again_and_again(tmp_path: Path) -> None:
    for step in range(1, 12):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, checkpoint.Policy(last=2))
        damage(tmp_path / f"step_{step:08d}")
        (tmp_path / f"step_{step:08d}.tmp").mkdir()
        assert len(names(tmp_path)) <= 5


def test_what_was_passed_over_is_set_aside_and_of_that_the_newest_is_kept(two: Path) -> None:
    save(two, 30, 40)
    for step in (20, 30, 40):
        damage(two / f"step_{step:08d}")
    (two / "step_00000035.tmp").mkdir()
    assert newest_step(two) == 10
    checkpoint.tidy(two, 10)
    assert names(two) == {"step_00000010", "step_00000040.damaged"}
    assert newest_step(two) == 10


def test_tidying_a_directory_without_checkpoints_makes_nothing(tmp_path: Path) -> None:
    checkpoint.tidy(tmp_path / "checkpoints", 0)
    assert names(tmp_path) == set()


def test_when_all_were_set_aside_nothing_starts_from_scratch(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step_00000010").rename(tmp_path / "step_00000010.damaged")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path, lambda text: None)


def test_a_checkpoint_that_a_newer_version_wrote_counts(two: Path) -> None:
    place = two / "step_00000010"
    (place / "state.json").write_text('{"format": 99}')
    sign(place)
    checkpoint.prune(two, checkpoint.Policy(last=2))
    assert names(two) == {"step_00000010", "step_00000020"}


SAVE_AND_PRUNE = """
import sys, torch
from itertools import count
from pathlib import Path
from fnrecipe import checkpoint
for step in count(1):
    checkpoint.save(Path(sys.argv[1]), step, {"x": torch.tensor(step)}, None, {})
    checkpoint.prune(Path(sys.argv[1]), checkpoint.Policy(last=1))
    print(step, flush=True)
"""


def test_a_reader_always_finds_a_whole_checkpoint_while_another_process_saves_and_prunes(tmp_path: Path) -> None:
    command, warnings, seen = [sys.executable, "-c", SAVE_AND_PRUNE, str(tmp_path)], [], set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "1\n"
            while len(seen) < 40:
                found = checkpoint.newest(tmp_path, warnings.append)
                assert found is not None
                seen.add(found.step)
                try:
                    assert checkpoint.restore(found, {"x": torch.tensor(0)})["x"] == found.step
                except CheckpointError as error:
                    gone = str(error)
                    assert "cannot read the checkpoint: " in gone
        finally:
            writer.kill()
    assert warnings == []


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_just_saved_survives_prune_after_a_fall_back(two: Path, keep: int) -> None:
    """Steps 30 and 20 are damaged, the run goes on from 10 and is stopped at 12: 12 is the newest that is whole."""
    save(two, 30)
    for step in (20, 30):
        (two / f"step_{step:08d}/state_0000.safetensors").write_bytes(b"half")
    assert newest_step(two) == 10
    save(two, 12)
    checkpoint.prune(two, checkpoint.Policy(last=keep))
    assert newest_step(two) == 12


@pytest.mark.parametrize("after", [4, 5, 99, 500])
def test_prune_looks_at_what_is_newer_than_a_step_alone(tmp_path: Path, after: int) -> None:
    steps = (5, 99, 100, 1000)
    save(tmp_path, *steps)
    checkpoint.prune(tmp_path, checkpoint.Policy(last=1), untouched=after)
    assert names(tmp_path) == {f"step_{step:08d}" for step in steps if step <= after or step == 1000}
