"""Old checkpoints go, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import checkpoint


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
    checkpoint.prune(tmp_path, keep)
    assert names(tmp_path) == {f"step_{step:08d}" for step in steps[-keep:]}


def test_prune_removes_what_a_killed_process_left(two: Path) -> None:
    (two / "step_00000030.tmp").mkdir()
    (two / "step_00000030.tmp/state_0000.safetensors").write_bytes(b"half")
    checkpoint.prune(two, 2)
    assert names(two) == {"step_00000010", "step_00000020"}


def test_prune_passes_over_files_and_links_that_end_in_tmp(two: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "canary").touch()
    (two / "step_notes.tmp").write_text("a file")
    (two / "step_00000007.tmp").symlink_to(elsewhere)
    checkpoint.prune(two, 1)
    assert "step_00000010" not in names(two)
    assert (elsewhere / "canary").exists()


def test_a_kill_in_the_middle_of_prune_leaves_no_half_checkpoint(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(place: Path, *args: Any, **options: Any) -> None:
        (place / "state.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            checkpoint.prune(two, 1)
    assert [place.name for place in checkpoint.committed(two)] == ["step_00000020"]
    checkpoint.prune(two, 1)
    assert names(two) == {"step_00000020"}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_just_saved_survives_prune_after_a_fall_back(two: Path, keep: int) -> None:
    """Steps 30 and 20 are damaged, the run goes on from 10 and is stopped at 12: 12 is the newest that is whole."""
    save(two, 30)
    for step in (20, 30):
        (two / f"step_{step:08d}/state_0000.safetensors").write_bytes(b"half")
    assert newest_step(two) == 10
    save(two, 12)
    checkpoint.prune(two, keep)
    assert newest_step(two) == 12


@pytest.mark.parametrize("after", [4, 5, 99, 500])
def test_prune_looks_at_what_is_newer_than_a_step_alone(tmp_path: Path, after: int) -> None:
    steps = (5, 99, 100, 1000)
    save(tmp_path, *steps)
    checkpoint.prune(tmp_path, 1, after)
    assert names(tmp_path) == {f"step_{step:08d}" for step in steps if step <= after or step == 1000}
