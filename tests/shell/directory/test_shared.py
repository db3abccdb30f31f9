"""Ranks that do not see the directory which rank 0 writes to are found before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from fnrecipe.errors import UsageError
from fnrecipe.runtime.gang import Gang
from fnrecipe.shell.directory import lock, shared
from tests.ranks import on_ranks


def check(rank: int, size: int, folders: list[str]) -> None:
    shared.PATIENCE = 0.5
    gang, out = Gang(rank, size, dist.group.WORLD), Path(folders[rank])
    if rank == 0:
        with lock.claimed(out):
            found = seen(out, gang)
    else:
        found = seen(out, gang)
    blind = [f"rank {number}" for number, folder in enumerate(folders) if folder != folders[0]]
    expected = "one directory that all ranks see, which rank 0 is writing to; not seen by"
    assert found == (f"{out}: expected {expected} {', '.join(blind)}" if blind else None)


def seen(out: Path, gang: Gang) -> str | None:
    try:
        shared.check_shared(out, gang)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("names", [["a", "a", "a"], ["a", "b", "a"]])
def test_ranks_that_see_another_directory_are_named(tmp_path: Path, names: list[str]) -> None:
    with lock.claimed(tmp_path / "b"):
        on_ranks(3, check, [str(tmp_path / name) for name in names])
