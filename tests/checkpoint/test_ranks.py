"""Checkpoints of several ranks: what one of them finds, all of them do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint import tensors
from fnrecipe.errors import CheckpointError
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.gang import Gang
from tests.helpers import assert_same_bits
from tests.ranks import mesh_of, on_ranks


def find_damage_together(rank: int, size: int, root: Path) -> None:
    gang, mesh = Gang(rank, size), mesh_of(rank, size, sharding="fsdp", num_microbatches=size)
    states = {step: {"x": mesh.cut("x", step * torch.arange(64.0).view(8, 8))} for step in (1, 2, 3)}
    for step, state in states.items():
        checkpoint.save(root, step, state, None, {}, gang, mesh)
    if rank == 0:
        for step, other in {3: 0, 2: 1}.items():  # in step 3 rank 0's file, in step 2 rank 1's
            path = root / f"step_{step:08d}/state_{other:04d}.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    dist.barrier()
    warnings: list[str] = []
    found = checkpoint.newest(root, warnings.append, gang)
    assert found is not None
    assert found.step == 1
    assert [text.rpartition("over: ")[2].split()[0] for text in warnings] == [
        "state_0000.safetensors",
        "state_0001.safetensors",
    ]
    assert_same_bits(checkpoint.restore(found, tree.map(torch.zeros_like, states[2])), states[1])
    dist.barrier()
    if rank == 0:
        (root / "step_00000003/state_0001.safetensors").unlink()
        (root / "step_00000003").rename(root / "step_00000004")
    checkpoint.save(root, 3, states[3], None, {}, gang, mesh)
    if rank == 0:
        checkpoint.tidy(root, 3)
    with pytest.raises(CheckpointError, match="step_00000005: cannot write the checkpoint: rank 0: "):
        checkpoint.save(root, 5, states[3], float("nan"), {}, gang, mesh)
    assert {path.name for path in root.iterdir()} == {*(f"step_{step:08d}" for step in (1, 2, 3)), "step_00000004.damaged"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_FILE_BYTES", 128)
        deal_over_files(rank, root, gang, mesh)


def deal_over_files(rank: int, root: Path, gang: Gang, mesh: Mesh) -> None:
    """Files have consecutive numbers, those of rank 0 first, and are verified and restored as one is."""
    state = {name: mesh.cut(name, torch.arange(64.0).view(8, 8) + ord(name)) for name in "xyz"}  # 128 bytes on each rank
    state["more"] = torch.tensor(1.0)  # only rank 0 writes it
    place = checkpoint.save(root, 6, state, None, {}, gang, mesh)
    names = [f"state_{number:04d}.safetensors" for number in range(6)]
    found = checkpoint.of_step(root, 6, gang)
    assert sorted(path.name for path in place.glob("*.safetensors")) == names
    assert {name: sorted(saved.slices) for name, saved in found.tensors.items()} == {
        "more": names[:1],
        "x": [names[0], names[3]],
        "y": [names[1], names[4]],
        "z": [names[2], names[5]],
    }
    assert_same_bits(checkpoint.restore(found, tree.map(torch.zeros_like, state)), state)
    dist.barrier()
    if rank == 0:
        path = place / names[4]
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    dist.barrier()
    with pytest.raises(CheckpointError, match=rf"damaged one: {names[4]} is not what SHA256SUMS says"):
        checkpoint.of_step(root, 6, gang)


def test_all_ranks_fall_back_to_the_same_checkpoint_whoever_reads_the_damage(tmp_path: Path) -> None:
    on_ranks(2, find_damage_together, tmp_path)
