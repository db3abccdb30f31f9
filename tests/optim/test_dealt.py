"""Matrices dealt over ranks: each is computed once, by one rank, with the bits of one process."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import optim, tree
from fnrecipe.errors import UsageError
from fnrecipe.optim import Transform
from fnrecipe.parallel.deal import deal
from fnrecipe.parallel.mesh import Axis, Dealt, Mesh, is_shard
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits, draw
from tests.ranks import assembled, mesh_of, on_ranks

SHAPES = {"query": (16, 16), "up": (32, 16), "down": (16, 32), "odd": (3, 5), "norm": (16,)}
PARAMS = draw({name: torch.zeros(shape) for name, shape in SHAPES.items()}, seed=0)
MESHES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "zero1": {"sharding": "zero1"},
    "hybrid fsdp": {"sharding": "fsdp", "shard_size": 2},
    "tensor and fsdp": {"sharding": "fsdp", "tensor_parallel_size": 2},
}
RULES = {"up": 0, "down": 1, "query": 0}


def matrix(path: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2


TRANSFORMS = {
    "muon": optim.masked(optim.scale_by_muon(), matrix),
    "dion2": optim.masked(optim.scale_by_dion2(), matrix),
    "normuon and the size of parameters": optim.masked(
        optim.chain(optim.scale_by_normuon(), optim.scale_by_parameter_rms()), matrix
    ),
    "soap": optim.masked(optim.scale_by_soap(every=2), matrix),
    "adafactor": optim.chain(optim.scale_by_factored_rms()),
    "one matrix for all ranks": optim.masked(
        optim.chain(optim.scale_by_parameter_rms(), optim.scale_by_adam(), optim.scale_by_factored_rms()),
        lambda path, parameter: path == "up",
    ),
}


def test_the_largest_go_first_each_to_the_rank_that_has_least_to_do() -> None:
    mesh = Mesh(Axis("replica", 2), Axis("shard", 2, blocks=2, replicas=Axis("replica", 2)))
    found = deal(cut(PARAMS, mesh))
    assert [axis.name for axis in found.axes] == ["replica", "shard"]
    owners = {path: tuple(hop.owner for hop in route) for path, route in found.routes.items()}
    assert owners == {"up": (0, 0), "down": (0, 1), "query": (1, 0), "odd": (1, 1), "norm": (1, 1)}
    assert [hop.dim for hop in found.routes["query"]] == [None, 0]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_no_rank_has_more_to_do_than_a_mean_rank_and_one_matrix(shapes: list[tuple[int, int]], size: int) -> None:
    mesh = Mesh(shard=Axis("shard", size, blocks=size))
    params = {str(number): mesh.cut("", torch.zeros(shape)) for number, shape in enumerate(shapes)}
    routes = deal(params).routes
    loads, costs = [0] * size, [rows * columns * min(rows, columns) for rows, columns in shapes]
    for path, cost in enumerate(costs):
        loads[routes[str(path)][0].owner if size > 1 else 0] += cost
    assert max(loads) <= sum(costs) / size + max(costs)


def updated(transform: Transform, mesh: Mesh, traced: bool) -> tuple[Tree, Tree]:
    """The last updates and the state after three steps."""
    params, update = cut(PARAMS, mesh), jit(transform.update) if traced else transform.update
    state = optim.init_parts(transform, params)
    for step in range(1, 4):
        updates, state, _ = update(cut(draw(PARAMS, seed=step), mesh), state, params, torch.tensor(step))
    return updates, state


def cut(values: Tree, mesh: Mesh) -> Tree:
    return {path: mesh.cut(path, leaf) for path, leaf in values.items()}


def mesh_like(rank: int, size: int, options: dict[str, Any]) -> Mesh:
    return attrs.evolve(mesh_of(rank, size, **options), rules=RULES)


def check(rank: int, size: int, meshes: list[str], traced: bool) -> None:
    for name in meshes:
        mesh = mesh_like(rank, size, MESHES[name])
        for transform in TRANSFORMS.values():
            found, expected = updated(transform, mesh, traced), updated(transform, mesh_like(0, 1, {}), traced=False)
            assert_same_bits(assembled(size, found), tree.paths(expected))


def check_two(rank: int, size: int) -> None:
    check(rank, size, ["replicate", "zero1"], False)
    check_finite(rank, size)


def check_finite(rank: int, size: int) -> None:
    """A state that is not finite on the one rank that has it: no rank makes the update."""

    def init(params: Tree) -> Tree:
        return tree.map(torch.zeros_like, params)

    def update(updates: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, optim.Report]:
        return updates, tree.map(lambda p: p / (len(p) - len(PARAMS["up"])), params), {}

    params = cut(PARAMS, mesh_like(rank, size, {}))
    transform = Transform(init, update, needs="matrices")
    state, mean = optim.init_parts(transform, params), optim.mean_gradient(params, torch.tensor(1))
    begin = (params, state, mean.total)
    found = optim.guarded_update(transform, mean, state, params, torch.tensor(1), torch.tensor(True), torch.tensor([1, 2]))
    assert not found[3]
    assert_same_bits((*found[:2], mean.total), begin)


def test_two_ranks() -> None:
    on_ranks(2, check_two)


def check_four(rank: int, size: int) -> None:
    check(rank, size, [*MESHES], False)
    check(rank, size, ["replicate", "hybrid fsdp"], True)
    check_each_is_computed_once(rank, size)


def check_each_is_computed_once(rank: int, size: int) -> None:
    computed: list[str] = []

    def note(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, optim.Report]:
        computed.extend(updates)
        return updates, {}

    for options in MESHES.values():
        params = cut(PARAMS, mesh_like(rank, size, options))
        transform = optim.chain(optim.stateless(note, needs="matrices"), optim.scale_by_factored_rms())
        state = transform.init(params)
        computed.clear()
        _, state, _ = transform.update(params, state, params, torch.tensor(1))
        of_ranks: list[Any] = [None] * size
        dist.all_gather_object(of_ranks, computed)
        assert sorted(path for of_rank in of_ranks for path in of_rank) == sorted(PARAMS)
        kept = tree.paths(state, is_shard)
        assert {path for path in PARAMS if kept[f"1.squares.{path}.0"].held} == set(computed)
        assert all(tree.leaves(leaf)[0].numel() == 0 for leaf in kept.values() if isinstance(leaf, Dealt) and not leaf.held)


@pytest.mark.slow
def test_four_ranks_of_which_some_have_nothing_to_compute_eagerly_and_traced() -> None:
    on_ranks(4, check_four)


def test_an_update_of_matrices_reports_nothing() -> None:
    transform = optim.stateless(lambda updates, params, step: (updates, {"size": step}), needs="matrices")
    with pytest.raises(UsageError, match="expected no report from an update of single matrices, found 'size'"):
        optim.update_parts(transform, PARAMS, (), PARAMS, torch.tensor(1))
