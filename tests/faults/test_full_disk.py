"""A file system that fills while a checkpoint is written beside the steps."""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from fnrecipe import checkpoint
from fnrecipe.checkpoint import tensors
from fnrecipe.errors import CheckpointError
from fnrecipe.runtime.background import Background
from tests.checkpoints import silent


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root mounts a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("files", [1, 4])
def test_it_is_told_in_bytes_and_the_checkpoint_before_is_there(
    small_disk: Path, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_FILE_BYTES", 160_000 // files)
    root, background = small_disk / "checkpoints", Background("saves")
    state = {name: torch.zeros(10_000) for name in "abcd"}

    def save(step: int) -> None:
        for leaf in state.values():
            leaf.fill_(step)
        copy = checkpoint.copied(checkpoint.snapshot(state), {})
        background.start(partial(checkpoint.write, root, step, copy, None, {}))

    with pytest.raises(CheckpointError) as caught:
        deque(map(save, count(1)), maxlen=0)
    last = checkpoint.newest(root, silent)
    assert last is not None
    assert 1 <= last.step <= 3  # 160,000 bytes each
    assert len(list(last.directory.glob("*.safetensors"))) == files
    told = f"step_{last.step + 1:08d}: cannot write the checkpoint: No space left on device, behind "
    assert told in str(caught.value)
    assert str(caught.value).endswith(" of 160,000 bytes")
    assert all(bool((leaf == last.step).all()) for leaf in checkpoint.restore(last, state).values())
    assert [path.name for path in root.iterdir() if path.suffix] == []
