"""Parts: where a cut goes, what is whose, and norms and files that do not depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import tree
from fnrecipe.checkpoint import tensors
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.parallel.mesh import ALIGNMENT, Axis, Mesh, Shard, global_slice, is_primary, is_shard, shard_dim
from tests.helpers import assert_same_bits

RULES = {"*.columns": 0, "*.rows": 1}
SHAPES = {
    "a.columns": (16, 24),
    "a.rows": (24, 16),
    "a.vector": (128,),
    "b.columns": (8, 3, 64),
    "b.odd": (7, 5),
    "b.wide": (3, 256),
}


def meshes(replicas: int, shard: int, tensor: int, blocks: int = 8) -> list[Mesh]:
    """The mesh, seen from each of its ranks."""
    return [
        Mesh(
            Axis("replica", replicas, replica),
            Axis("shard", shard, index, blocks=blocks),
            Axis("tensor", tensor, column, blocks=tensor),
            rules=RULES,
        )
        for replica, index, column in product(range(replicas), range(shard), range(tensor))
    ]


def values(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(shape, generator=generator) for path, shape in SHAPES.items()}


def state_of(mesh: Mesh, seed: int = 0) -> Any:
    """Cut parameters, and something that every rank has whole."""
    return {"params": {path: mesh.cut(path, leaf) for path, leaf in values(seed).items()}, "step": torch.tensor(seed)}


sizes = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    blocks=st.sampled_from([1, 2, 4, 8]),
)
def test_a_cut_is_along_the_first_dimension_that_gives_equal_parts_of_whole_vectors(
    shape: tuple[int, ...], blocks: int
) -> None:
    dim, size = shard_dim(shape, blocks), torch.Size(shape).numel()
    fitting = [n for n, length in enumerate(shape) if length % blocks == 0 and size // blocks % ALIGNMENT == 0]
    assert dim == (fitting[0] if fitting and size % blocks == 0 else None)


@given(sizes=sizes)
def test_parts_of_all_ranks_make_the_whole_and_each_is_owned_once(sizes: tuple[int, int, int]) -> None:
    whole = values()
    times = {path: torch.zeros(shape) for path, shape in SHAPES.items()}
    for mesh in meshes(*sizes):
        for path, leaf in whole.items():
            part = mesh.cut(path, leaf)
            shape, ranges = global_slice(part)
            where = tuple(slice(start, stop) for start, stop in ranges)
            assert shape == leaf.shape
            assert_same_bits(tree.leaves(part)[0], leaf[where].contiguous())
            times[path][where] += is_primary(part, mesh)
    assert all((count == 1).all() for count in times.values())


def test_parts_are_copies_and_add_nothing_to_paths() -> None:
    mesh = meshes(1, 2, 2)[3]
    leaf = torch.ones(16, 24)
    part = mesh.cut("a.columns", leaf)
    leaf.zero_()
    assert (tree.leaves(part)[0] == 1).all()
    assert tree.paths({"x": part}).keys() == {"x"}
    assert tree.paths({"x": part}, is_shard) == {"x": part}
    doubled = tree.map(lambda local: 2 * local, part)
    assert (doubled.dim, doubled.axis) == (part.dim, part.axis)


def test_a_dimension_that_a_rule_cannot_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot cut \[7, 5\] along dimension 0 into 2 parts"):
        meshes(1, 1, 2)[0].cut("a.columns", torch.zeros(7, 5))


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_the_norm_is_that_of_all_entries(blocks: int) -> None:
    cut = tree.map(Tensor.double, state_of(meshes(1, 1, 1, blocks)[0])["params"])
    plain = {path: leaf.double() for path, leaf in values().items()}
    truth = torch.cat([leaf.flatten() for leaf in plain.values()]).square().sum().sqrt()
    torch.testing.assert_close(global_norm(cut), truth)
    torch.testing.assert_close(global_norm(plain), truth)


def write(folder: Path, rank: int, mesh: Mesh, *seed: int) -> Mapping[str, tensors.Saved]:
    """Writes what a rank holds of the state; gives what lies where."""
    return tensors.write(folder, tensors.snapshot(state_of(mesh, *seed), mesh), rank)[1]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(written=sizes, wanted=sizes, seed=st.integers(0, 99))
def test_what_ranks_of_one_mesh_wrote_is_read_by_ranks_of_any_other(
    tmp_path: Path, written: tuple[int, int, int], wanted: tuple[int, int, int], seed: int
) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    saved = tensors.merged(write(tmp_path, rank, mesh, seed) for rank, mesh in enumerate(meshes(*written)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 * sum(map(Tensor.numel, values().values())) + 2000 * 128
    for mesh in meshes(*wanted):
        blank = tree.map(torch.zeros_like, state_of(mesh, seed))
        assert tensors.mismatches(saved, blank) == []
        found = tensors.read(tmp_path, saved, blank)
        assert_same_bits(found, state_of(mesh, seed))


def test_a_rank_reads_no_more_than_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers, reader = meshes(1, 8, 1), meshes(1, 4, 1)[1]
    saved = tensors.merged(write(tmp_path, rank, mesh) for rank, mesh in enumerate(writers))
    read: list[tuple[str, int]] = []
    real = tensors._values

    def counting(file: Any, name: str, slices: Any) -> Tensor:
        values = real(file, name, slices)
        read.append((name, values.numel()))
        return values

    monkeypatch.setattr(tensors, "_values", counting)
    like = state_of(reader)
    tensors.read(tmp_path, saved, like)
    wanted = {path: tree.leaves(leaf)[0].numel() for path, leaf in tree.paths(like, is_shard).items()}
    found = {name: sum(size for other, size in read if other == name) for name, _ in read}
    assert found == wanted


def test_shapes_and_dtypes_are_compared_whole() -> None:
    mesh = meshes(1, 2, 1)[0]
    part = mesh.cut("x", torch.zeros(16, 16))
    saved = {"x": tensors.Saved("float32", [16, 16], {})}
    assert tensors.mismatches(saved, {"x": part}) == []
    assert tensors.mismatches(saved, {"x": attrs.evolve(part, local=part.local.half())}) == [
        "x: expected float16 [16, 16], found float32 [16, 16] in the checkpoint"
    ]
    assert tensors.mismatches(saved, {"x": Shard(torch.zeros(4, 16), 0, mesh.shard)}) == [
        "x: expected float32 [8, 16], found float32 [16, 16] in the checkpoint"
    ]
