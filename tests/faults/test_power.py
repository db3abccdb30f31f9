"""After a loss of power at any call of a writer, what was promised to be on disk is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fnrecipe import checkpoint
from fnrecipe.errors import CheckpointError
from fnrecipe.runtime.files import make_folder, replace
from fnrecipe.shell.recording.jsonl import append
from tests.checkpoints import CURSOR, FINGERPRINTS, assert_is_step, newest, save_two, small_state
from tests.faults.power import Survivors, recorded, written


def save_and_prune(root: Path) -> None:
    checkpoint.save(root, 30, small_state(30.0), CURSOR, FINGERPRINTS)
    checkpoint.prune(root, checkpoint.Policy(last=1))


def test_a_loss_of_power_at_any_call_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    root = save_two(tmp_path / "out")
    with recorded(root) as disk:
        checkpoint.save(root, 30, small_state(30.0), CURSOR, FINGERPRINTS)
        saved = len(disk.trees)
        checkpoint.prune(root, checkpoint.Policy(last=1))
    steps = []
    for number, tree in enumerate(disk.trees):
        found, warnings = newest(written(tree, tmp_path / str(number)))
        assert found is not None
        assert_is_step(found, found.step)
        assert not [line for line in warnings if "step_00000030" in line]
        steps.append(found.step)
    assert set(steps[:saved]) == {20, 30}
    assert set(steps[saved:]) == {30}


@pytest.mark.parametrize("broken", ["file", "directory"])
def test_a_writer_that_forgets_to_sync_is_found(tmp_path: Path, broken: str) -> None:
    root = save_two(tmp_path / "out")
    with recorded(root, broken) as disk:
        save_and_prune(root)
    lost = 0
    for number, tree in enumerate(disk.trees):
        try:
            found, warnings = newest(written(tree, tmp_path / str(number)))
            lost += found is None or bool(warnings)
        except CheckpointError:
            lost += 1
    assert lost


def test_the_first_checkpoint_is_there_when_it_was_saved(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with recorded(tmp_path / "out") as disk:
        checkpoint.save(tmp_path / "out/checkpoints", 30, small_state(30.0), CURSOR, FINGERPRINTS)
        trees = disk.survivors()
    for number, tree in enumerate(trees):
        assert_is_step(newest(written(tree, tmp_path / str(number)) / "checkpoints")[0], 30)


def test_a_file_that_is_replaced_has_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"old")
    with recorded(tmp_path) as disk:
        replace(tmp_path / "config.yaml", b"new")
    assert {content_of(tree, "config.yaml") for tree in disk.trees} == {b"old", b"new"}
    with recorded(tmp_path) as disk:
        pass
    assert {content_of(tree, "config.yaml") for tree in disk.trees} == {b"new"}


def test_rows_that_were_recorded_are_there(tmp_path: Path) -> None:
    with recorded(tmp_path) as disk:
        append(tmp_path / "train.jsonl", [{"step": 1}])
        trees = disk.survivors()
        append(tmp_path / "train.jsonl", [{"step": 2}])
    assert all(content_of(tree, "train.jsonl").startswith(b'{"step": 1}\n') for tree in trees)
    assert content_of(disk.trees[-1], "train.jsonl") == b'{"step": 1}\n{"step": 2}\n'


def content_of(tree: Survivors, name: str) -> bytes:
    found = tree.get(name, b"")
    assert isinstance(found, bytes)
    return found


def test_a_folder_that_was_made_is_there(tmp_path: Path) -> None:
    with recorded(tmp_path) as disk:
        make_folder(tmp_path / "a/b")
        make_folder(tmp_path / "a/b/c")
        trees = disk.survivors()
    assert all(tree == {"a": {"b": {"c": {}}}} for tree in trees)
