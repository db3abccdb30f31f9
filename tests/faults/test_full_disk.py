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


def test_it_is_told_in_bytes_and_the_checkpoint_before_is_there(small_disk: Path) -> None:
    root, background = small_disk / "checkpoints", Background("saves")
    state = {"x": torch.zeros(40_000)}

    def save(step: int) -> None:
        state["x"].fill_(step)
        copy = checkpoint.copied(checkpoint.snapshot(state), {})
        background.start(partial(checkpoint.write, root, step, copy, None, {}))

    with pytest.raises(CheckpointError) as caught:
        deque(map(save, count(1)), maxlen=0)
    last = checkpoint.newest(root, silent)
    assert last is not None
    assert 1 <= last.step <= 3  # 160,000 bytes each
    told = f"step_{last.step + 1:08d}: cannot write the checkpoint: No space left on device, behind "
    assert told in str(caught.value)
    assert str(caught.value).endswith(" of 160,000 bytes")
    assert bool((checkpoint.restore(last, state)["x"] == last.step).all())
    assert [path.name for path in root.iterdir() if path.suffix] == []
