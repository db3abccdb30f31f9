"""Checkpoints that are written beside the steps: the bytes of those for which steps wait, and nothing is lost on the way."""

from __future__ import annotations

import io
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint.store import Snapshot
from fnrecipe.errors import CheckpointError
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.background import Background
from fnrecipe.runtime.gang import Gang, apart
from fnrecipe.runtime.last_words import lost_contact
from tests.checkpoints import CURSOR, FINGERPRINTS, assert_is_step, save_two, silent, small_state
from tests.ranks import mesh_of, on_ranks


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def spoil(state: Any) -> None:
    """What a step does that writes the next state in place."""
    for leaf in tree.leaves(state):
        leaf.view(-1).view(torch.uint8).fill_(7)


def test_a_copy_keeps_what_the_state_was_and_the_next_one_takes_its_memory(tmp_path: Path) -> None:
    state: Any = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(1), "c": torch.tensor([True, False])}
    checkpoint.save(tmp_path / "waited", 1, {name: leaf.clone() for name, leaf in state.items()}, None, {})
    first = checkpoint.copied(checkpoint.snapshot(state), {})
    spoil({"a": state["a"].t(), "b": state["b"], "c": state["c"]})
    checkpoint.write(tmp_path / "beside", 1, first, None, {})
    assert contents(tmp_path / "beside") == contents(tmp_path / "waited")
    second = checkpoint.copied(checkpoint.snapshot({**state, "d": torch.zeros(2)}), first.tensors)
    assert [second.tensors[name].data_ptr() for name in state] == [first.tensors[name].data_ptr() for name in state]
    third = checkpoint.copied(checkpoint.snapshot({"a": torch.zeros(2, 3)}), first.tensors)
    assert third.tensors["a"].shape == (2, 3)


# Several ranks.


def state_of(mesh: Mesh) -> Any:
    matrices = {f"layers.{number}": torch.arange(number, number + 512.0).view(32, 16) for number in range(3)}
    return {"params": {path: mesh.cut(path, leaf) for path, leaf in matrices.items()}, "step": torch.tensor(5)}


SHARDINGS: list[dict[str, Any]] = [
    {"sharding": "replicate"},
    {"sharding": "zero1"},
    {"sharding": "fsdp"},
    {"sharding": "fsdp", "shard_size": 2},
]


def save_both_ways(rank: int, size: int, root: Path) -> None:
    gang = Gang(rank, size)
    beside, background = apart(gang, 1), Background("saves")
    for number, sharding in enumerate(SHARDINGS):
        mesh = mesh_of(rank, size, num_microbatches=size, **sharding)
        checkpoint.save(root / f"{number} waited", 5, state_of(mesh), CURSOR, FINGERPRINTS, gang, mesh)
        state = state_of(mesh)
        copy = checkpoint.copied(checkpoint.snapshot(state, mesh), {})
        background.start(partial(checkpoint.write, root / f"{number} beside", 5, copy, CURSOR, FINGERPRINTS, beside))
        for _ in range(50):  # collectives of steps, which no thread's may get between
            total = torch.ones(1000) * rank
            dist.all_reduce(total)
            assert total[0] == sum(range(size))
            spoil(state)
    background.wait()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_ranks_write_beside_their_steps_has_the_bytes_of_what_they_wait_for(tmp_path: Path, size: int) -> None:
    on_ranks(size, save_both_ways, tmp_path)
    for number in range(len(SHARDINGS)):
        found = contents(tmp_path / f"{number} beside")
        assert found == contents(tmp_path / f"{number} waited")
        assert len(found) >= 3


def fail_or_end_while_others_write(rank: int, size: int, root: Path) -> None:
    gang, mesh = Gang(rank, size), mesh_of(rank, size, sharding="fsdp", num_microbatches=size)
    beside, background = apart(gang, 1), Background("saves")
    checkpoint.save(root, 1, state_of(mesh), None, {}, gang, mesh)
    copy = checkpoint.snapshot(state_of(mesh), mesh)
    unwritable = Snapshot({**copy.tensors, "x": torch.zeros(1, dtype=torch.complex128)}, copy.slices)
    background.start(partial(checkpoint.write, root, 2, unwritable if rank == 1 else copy, None, {}, beside))
    with pytest.raises(CheckpointError, match="step_00000002: cannot write the checkpoint: rank 1: expected dtypes"):
        background.wait()
    assert [path.name for path in root.iterdir()] == ["step_00000001"]
    dist.barrier()
    if rank == 1:
        os._exit(0)  # on its way to the save that the others have begun
    background.start(partial(checkpoint.write, root, 3, copy, None, {}, beside))
    with pytest.raises(RuntimeError) as caught:
        background.wait(30)
    assert lost_contact(caught.value)
    assert [path.name for path in checkpoint.committed(root)] == ["step_00000001"]
    os._exit(0)  # there is nobody left to part from


def test_a_rank_that_cannot_write_or_ends_is_an_error_on_the_others_and_commits_nothing(tmp_path: Path) -> None:
    on_ranks(2, fail_or_end_while_others_write, tmp_path)


# A process that is killed between any two system calls of the writer.

CALLS = [(os, name) for name in ("open", "pwrite", "ftruncate", "fsync", "mkdir", "rename", "unlink", "rmdir")]


class Counted:
    """A file that counts its writes."""

    def __init__(self, file: Any, count: Any) -> None:
        self._file, self._count = file, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._count()
        return int(self._file.write(data))


def killed_before_call(root: Path, last: int) -> None:
    """Saves step 30 beside a step and prunes, in a process that SIGKILL ends before call number `last` of the writer."""
    calls = 0

    def count() -> None:
        nonlocal calls
        if threading.current_thread() is not threading.main_thread():
            calls += 1
            if calls > last:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            count()
            return real(*args, **options)

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    opened = io.open
    io.open = lambda *args, **options: Counted(counted(opened)(*args, **options), count)  # type: ignore[assignment]
    state = small_state(30.0)
    copy, background = checkpoint.copied(checkpoint.snapshot(state), {}), Background("saves")

    def work() -> None:
        checkpoint.write(root, 30, copy, CURSOR, FINGERPRINTS)
        checkpoint.prune(root, checkpoint.Policy(last=2))

    background.start(work)
    spoil(state)
    background.wait()


def kill_at_every_call(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    newest = []
    for last in range(100):
        root = folder / str(last)
        root.mkdir()
        save_two(root)
        child = os.fork()  # no thread is running here
        if child == 0:
            killed_before_call(root, last)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = checkpoint.newest(root, silent)
        assert found is not None
        newest.append(found.step)
        assert_is_step(found, found.step)
        assert len(checkpoint.committed(root)) >= 2
        checkpoint.tidy(root, found.step)  # as the next start does, which saves the step again
        checkpoint.save(root, 30, small_state(30.0), CURSOR, FINGERPRINTS)
        checkpoint.prune(root, checkpoint.Policy(last=2))
        assert {path.name for path in root.iterdir()} == {"step_00000020", "step_00000030"}
        assert_is_step(checkpoint.newest(root, silent), 30)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert newest == sorted(newest)
    assert newest.count(20) > 15  # calls before the commit
    assert newest.count(30) > 5  # calls behind it


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_call_of_the_writer_loses_nothing(tmp_path: Path) -> None:
    multiprocessing.start_processes(kill_at_every_call, (tmp_path,), nprocs=1, start_method="forkserver")
