"""What is kept of an older checkpoint: its model alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint import Policy
from fnrecipe.errors import CheckpointError
from fnrecipe.tree import Tree
from tests.checkpoints import sign
from tests.helpers import assert_same_bits

POLICY = Policy(last=1, every_n_steps=10, model_only=True)


def state(step: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(step)
    leaves = {name: torch.randn(3, 5, generator=draw) for name in ("weight", "scale")}
    mean = {"mean": {"weight": torch.randn(3, 5, generator=draw).double()}}
    return {"params": leaves, "optimizer": (torch.randn(9, generator=draw), torch.tensor(step)), "average": mean}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 15 and 20."""
    for step in (10, 15, 20):
        checkpoint.save(tmp_path, step, state(step), {"at": step}, {"data: a": "x"})
    return tmp_path


def zeros(like: Tree) -> Tree:
    return tree.map(torch.zeros_like, like)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_an_older_one_holds_its_model_bit_for_bit_and_nothing_else(three: Path) -> None:
    checkpoint.prune(three, POLICY)
    assert names(three) == {"model_00000010", "step_00000020"}
    found = checkpoint.of_step(three, 10)
    assert (found.step, found.cursor, found.files) == (10, {"at": 10}, {"data: a": "x"})
    model = {name: state(10)[name] for name in ("params", "average")}
    assert_same_bits(checkpoint.restore(found, zeros(model)), model)
    tensors = load_file(three / "model_00000010/state_0000.safetensors")
    assert tensors.keys() == {"params.weight", "params.scale", "average.mean.weight"}
    for line in (three / "model_00000010/SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((three / "model_00000010" / name).read_bytes()).hexdigest() == digest
    assert [path.name for path in checkpoint.models(three)] == ["model_00000010"]
    assert [path.name for path in checkpoint.committed(three)] == ["step_00000020"]


def test_no_run_goes_on_from_a_model_alone_nor_from_scratch_beside_it(three: Path) -> None:
    checkpoint.prune(three, POLICY)
    newest = checkpoint.newest(three, lambda text: None)
    assert newest is not None
    assert newest.step == 20
    shutil.rmtree(three / "step_00000020")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged, or holds its model alone"):
        checkpoint.newest(three, lambda text: None)


def test_a_model_that_is_no_longer_kept_goes(three: Path) -> None:
    checkpoint.prune(three, POLICY)
    checkpoint.prune(three, Policy(last=1, best=1), {10: 2.0, 20: 1.0})
    assert names(three) == {"step_00000020"}


def test_what_is_damaged_is_not_copied(three: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = three / "step_00000010/state_0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    checkpoint.prune(three, POLICY)
    assert names(three) == {"step_00000010", "step_00000020"}
    assert "step_00000010: cannot reduce it to its model, so that it stays as it is: " in caplog.text


def test_a_full_disk_leaves_it_whole(three: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fnrecipe.checkpoint.tensors.copy", full)
        checkpoint.prune(three, POLICY)
    assert names(three) == {"step_00000010", "step_00000020"}
    assert "No space left on device" in caplog.text
    checkpoint.prune(three, POLICY)
    assert names(three) == {"model_00000010", "step_00000020"}


class Killed(BaseException):
    """The end of a process, as far as files go."""


@pytest.mark.parametrize("call", range(10))
def test_a_kill_at_any_point_loses_nothing(three: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Before each call by which files change their names, are synced or removed."""
    left = iter(range(call))

    def dies(function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return function(*args, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dies(os.fsync))
        patch.setattr(Path, "rename", dies(Path.rename))
        patch.setattr(shutil, "rmtree", dies(shutil.rmtree))
        with pytest.raises(Killed):
            checkpoint.prune(three, POLICY)
    found = checkpoint.of_step(three, 10)
    model = {"params": state(10)["params"]}
    if found.directory.name.startswith("model"):
        assert_same_bits(load_file(found.directory / "state_0000.safetensors")["params.scale"], model["params"]["scale"])
    else:
        assert_same_bits(checkpoint.restore(found, zeros(state(10))), state(10))
    checkpoint.prune(three, POLICY)
    assert names(three) == {"model_00000010", "step_00000020"}


def test_a_step_that_is_passed_over_takes_its_later_models_with_it(three: Path) -> None:
    checkpoint.prune(three, POLICY)
    checkpoint.tidy(three, 5)
    assert names(three) == {"model_00000010.damaged", "step_00000020.damaged"}


def test_of_several_files_those_without_a_part_of_the_model_go(three: Path) -> None:
    """As of a rank that holds nothing but a part of the optimizer's state."""
    place, files = three / "step_00000010", ["state_0000.safetensors", "state_0001.safetensors"]
    tensors = load_file(place / files[0])
    optimizer = {path: tensor for path, tensor in tensors.items() if path.startswith("optimizer")}
    save_file({path: tensor for path, tensor in tensors.items() if path not in optimizer}, place / files[0])
    save_file(optimizer, place / files[1])
    manifest = json.loads((place / "state.json").read_text())
    manifest["shards"] = files
    for path in optimizer:
        dtype, shape, slices = manifest["tensors"][path]
        manifest["tensors"][path] = [dtype, shape, {files[1]: slices[files[0]]}]
    (place / "state.json").write_text(json.dumps(manifest))
    sign(place)
    checkpoint.prune(three, POLICY)
    assert names(three / "model_00000010") == {"state_0000.safetensors", "state.json", "SHA256SUMS"}
    model = {name: state(10)[name] for name in ("params", "average")}
    assert_same_bits(checkpoint.restore(checkpoint.of_step(three, 10), zeros(model)), model)
