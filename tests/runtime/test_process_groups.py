"""The mesh of a run: sizes of its axes, and which lanes a rank takes."""

from __future__ import annotations

from itertools import chain, product
from typing import Any

import pytest
import torch

from fnrecipe.config import GangSection, resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import ConfigError, UsageError
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.recipes.lm.config import config as lm
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import _coordinates, axis_sizes, lane_assignment, make_mesh


@pytest.mark.parametrize(
    ("options", "world_size", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (4, 1, 1)),
        ({"shard_size": 2}, 4, (4, 1, 1)),
        ({"sharding": "zero1"}, 4, (1, 4, 1)),
        ({"sharding": "fsdp"}, 1, (1, 1, 1)),
        ({"sharding": "fsdp", "shard_size": 2}, 8, (4, 2, 1)),
        ({"sharding": "fsdp", "tensor_parallel_size": 2}, 8, (1, 4, 2)),
        ({"sharding": "zero2", "shard_size": 2, "tensor_parallel_size": 2}, 8, (2, 2, 2)),
        ({"tensor_parallel_size": 3}, 6, (2, 1, 3)),
    ],
)
def test_sizes_of_the_axes(options: dict[str, Any], world_size: int, expected: tuple[int, int, int]) -> None:
    assert axis_sizes(GangSection(**options), world_size) == expected


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        ({"tensor_parallel_size": 2}, 3, "world size: expected a multiple of gang.tensor_parallel_size = 2, found 3"),
        (
            {"sharding": "fsdp", "shard_size": 4},
            2,
            "gang.shard_size: expected a divisor of the 2 ranks that share the data, found 4",
        ),
    ],
)
def test_a_world_that_cannot_be_divided_so_is_refused(options: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        axis_sizes(GangSection(**options), world_size)
    assert str(caught.value) == message


def test_tensor_parallelism_needs_rules() -> None:
    config = GangSection(tensor_parallel_size=2)
    with pytest.raises(UsageError, match="expected 1 for a recipe without `rules` for its parameters, found 2"):
        make_mesh(config, Gang(0, 2), torch.device("cpu"), {})


def test_every_rank_has_a_place_of_its_own_and_tensor_ranks_are_neighbours() -> None:
    shape = (2, 4, 2)
    assert [_coordinates(rank, shape) for rank in range(16)] == list(product(range(2), range(4), range(2)))


def meshes(replicas: int, shard: int, tensor: int, sharding: Any) -> list[Mesh]:
    places = product(range(replicas), range(shard), range(tensor))
    shape = (("replica", replicas), ("shard", shard), ("tensor", tensor))
    axes = [[Axis(name, size, index) for (name, size), index in zip(shape, place, strict=True)] for place in places]
    return [Mesh(*each, sharding=sharding) for each in axes]


@pytest.mark.parametrize("sharding", ["replicate", "zero1", "zero2", "fsdp"])
@pytest.mark.parametrize("num_lanes", [8, 16])
def test_leaves_that_are_summed_over_ranks_first_are_neighbours_in_the_tree(sharding: str, num_lanes: int) -> None:
    """Sums over shards, a rank's leaves and replicas (or leaves, shards and replicas) take the leaves in their order."""
    for replicas, shard in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 8), (2, 4), (8, 1)):
        lanes = [lane_assignment(mesh, 8).lanes(num_lanes) for mesh in meshes(replicas, shard, 1, sharding)]
        assert sorted(chain(*lanes)) == list(range(num_lanes))
        size, turns = num_lanes // 8, 8 // (replicas * shard)
        leaves = [[tuple(mine[turn * size : (turn + 1) * size]) for turn in range(turns)] for mine in lanes]
        order = []
        for replica in range(replicas):
            ranks = leaves[replica * shard : (replica + 1) * shard]
            in_turns = sharding in ("zero2", "fsdp")
            order += [rank[turn] for turn in range(turns) for rank in ranks] if in_turns else chain(*ranks)
        assert list(chain(*order)) == list(range(num_lanes))


def test_tensor_ranks_have_the_same_lanes() -> None:
    lanes = [lane_assignment(mesh, 8).lanes(8) for mesh in meshes(1, 2, 2, "fsdp")]
    assert lanes == [[0, 2, 4, 6]] * 2 + [[1, 3, 5, 7]] * 2


def test_workers_share_the_lanes_of_their_rank_in_its_order() -> None:
    assignment = LaneAssignment(1, 4, interleave=2, rounds=2)
    assert assignment.lanes(16) == [2, 3, 6, 7]
    assert [part.lanes(16) for part in assignment.split(2)] == [[2, 3], [6, 7]]
    with pytest.raises(UsageError, match="expected 3 equal parts of a rank's 4 lanes"):
        assignment.split(3)[0].lanes(16)
    with pytest.raises(UsageError, match="expected a multiple of the world size 4 times 2 microbatches a rank, found 12"):
        assignment.lanes(12)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["gang.sharding=fsdp", "dataset.num_lanes=4"], "dataset.num_lanes: expected a multiple of gang.num_microbatches = 8"),
        (["gang.tensor_parallel_size=3"], "model.config.num_attn_heads: expected a multiple of gang.tensor_parallel_size = 3"),
        (["gang.shard_size=3"], "gang.shard_size: expected a power of two"),
        (["gang.sharding=ddp"], "gang.sharding: expected"),
    ],
)
def test_a_config_that_cannot_be_cut_so_is_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(lm, pairs=pairs)


def test_a_gang_of_one_leads() -> None:
    assert Gang().leads
    assert Gang().alone
