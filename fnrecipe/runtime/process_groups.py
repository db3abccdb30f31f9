"""The mesh of a run: the sizes of its axes, from the config, and the process groups along them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import attrs
import torch
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import GroupName, _set_pg_timeout

from fnrecipe.config import GangSection
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import UsageError
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.runtime.gang import Gang

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def axis_sizes(config: GangSection, world_size: int) -> tuple[int, int, int]:
    """Ranks along the axes replica, shard and tensor.

    Raises:
        UsageError: if the world size is not divisible as the config says.
    """
    tensor = config.tensor_parallel_size
    if world_size % tensor:
        raise UsageError(f"world size: expected a multiple of gang.tensor_parallel_size = {tensor}, found {world_size}")
    data = world_size // tensor
    shard = 1 if config.sharding == "replicate" else config.shard_size or data
    if data % shard:
        raise UsageError(f"gang.shard_size: expected a divisor of the {data} ranks that share the data, found {shard}")
    return data // shard, shard, tensor


def check_world_size(parts: Mapping[str, int], size: int) -> None:
    """Checks that the number of ranks divides all of `parts`, numbers by their keys in the config.

    Raises:
        UsageError: naming the sizes that would.
    """
    wrong = [f"{name} = {number}" for name, number in parts.items() if number % size]
    if wrong:
        fitting = [n for n in range(1, max(parts.values()) + 1) if not any(number % n for number in parts.values())]
        expected = ", ".join(map(str, fitting))
        raise UsageError(f"world size: expected a divisor of {' and '.join(wrong)} ({expected}), found {size}")


def make_mesh(config: GangSection, gang: Gang, device: torch.device, rules: Mapping[str, int]) -> Mesh:
    """The mesh, seen from this rank; creates the process groups, which all ranks must do together.

    Raises:
        UsageError: for tensor parallelism without rules.
    """
    if config.tensor_parallel_size > 1 and not rules:
        found = config.tensor_parallel_size
        raise UsageError(
            f"gang.tensor_parallel_size: expected 1 for a recipe without `rules` for its parameters, found {found}"
        )
    ordered, gathered = config.reduction == "invariant", _DTYPES[config.parameter_dtype]
    names, shape = ("replica", "shard", "tensor"), axis_sizes(config, gang.size)
    indices = _coordinates(gang.rank, shape)
    groups = [""] * 3
    if not gang.alone:
        made = init_device_mesh(device.type, shape, mesh_dim_names=names)
        groups = [made.get_group(name).group_name for name in names]
    replica, shard, tensor = (
        Axis(name, size, index, group, ordered=ordered)
        for name, size, index, group in zip(names, shape, indices, groups, strict=True)
    )
    shard = attrs.evolve(shard, blocks=config.num_microbatches, gathered=gathered, replicas=replica)
    return Mesh(replica, shard, attrs.evolve(tensor, blocks=tensor.size), config.sharding, rules)


def wait_at_most(mesh: Mesh, minutes: float) -> None:
    """From now on, what is exchanged along the axes of the mesh fails if another rank lets it wait for so long."""
    for name in {axis.group for axis in mesh.axes if axis.group}:
        _set_pg_timeout(timedelta(minutes=minutes), _resolve_process_group(GroupName(name)))


def lane_assignment(mesh: Mesh, num_microbatches: int) -> LaneAssignment:
    """The lanes that this rank reads; ranks along the tensor axis read the same ones."""
    rank, size = mesh.replica.index * mesh.shard.size + mesh.shard.index, mesh.replica.size * mesh.shard.size
    return (
        LaneAssignment(rank, size, mesh.shard.size, num_microbatches // size) if mesh.in_turns else LaneAssignment(rank, size)
    )


def _coordinates(rank: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    rest, tensor = divmod(rank, shape[2])
    replica, shard = divmod(rest, shape[1])
    return replica, shard, tensor
