"""A transform that needs whole matrices gets them: it trains the same bits on any number of ranks, under every sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe import optim, tree
from fnrecipe.models import llama
from fnrecipe.optim.transform import Needs
from fnrecipe.parallel.mesh import is_shard
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits
from tests.ranks import assembled, computed_once, mesh_of, on_ranks
from tests.transforms.test_gradients import CONFIG, FEW, HYBRID, KEY, LEAVES, MODES, RATE, TENSOR, chosen, train


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz towards the nearest orthogonal matrix: of a slice it is something else."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def scale_by_muon(needs: Needs) -> optim.Transform:
    """Muon, with a state of which most is not shaped like a parameter."""

    def init(params: Tree) -> Any:
        gram = tree.map(lambda p: p.new_zeros(p.shape[0], p.shape[0]), params)
        return {"momentum": tree.map(torch.zeros_like, params), "gram": gram, "count": torch.zeros((), dtype=torch.int64)}

    def update(gradients: Tree, state: Any, params: Tree, step: Tensor) -> tuple[Tree, Any, optim.Report]:
        momentum = tree.map(lambda m, g: 0.95 * m + g, state["momentum"], gradients)
        gram = tree.map(lambda s, g: s + g @ g.mT, state["gram"], gradients)
        updates = tree.map(lambda m, s, p: orthogonal(m) + 0.1 * p / (1 + s.trace()), momentum, gram, params)
        return updates, {"momentum": momentum, "gram": gram, "count": state["count"] + 1}, {}

    return optim.Transform(init, update, needs)


def muon(needs: Needs = "matrices") -> optim.Transform:
    rate = optim.scale_by_learning_rate(RATE)
    adam = optim.chain(optim.scale_by_adam(), rate)
    matrices = optim.chain(scale_by_muon(needs), rate)
    split = {"layers.*_norm": adam, "layers.*": matrices, "*": adam}
    return optim.chain(optim.clip_by_global_norm(1.0), optim.partition(split))


def check(rank: int, size: int, modes: dict[str, dict[str, Any]], traced: bool, dtype: torch.dtype) -> None:
    leaves = FEW if traced else LEAVES
    alone, metrics = computed_once(rank, train, mesh_of(0, 1), muon(), traced, dtype=dtype, leaves=leaves)
    for options in modes.values():
        state, found = train(mesh_of(rank, size, **options), muon(), traced, dtype=dtype, leaves=leaves)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(found, metrics)


def test_two_ranks() -> None:
    on_ranks(2, check, MODES, False, torch.float32)


@pytest.mark.slow
def test_two_ranks_traced_and_in_half_precision() -> None:
    on_ranks(2, check, chosen("fsdp"), True, torch.bfloat16)


@pytest.mark.slow
def test_four_ranks() -> None:
    on_ranks(4, check, HYBRID, False, torch.float32)


def check_tensor(rank: int, size: int) -> None:
    """Sums over ranks of tensor parallelism are others; so only the update is compared, of the same gradients."""
    params = llama.init(CONFIG, KEY)
    transform = muon()
    expected, after, _ = transform.update(tree.map(torch.sin, params), transform.init(params), params, torch.tensor(1))
    for options in TENSOR.values():
        parts = llama.init(CONFIG, KEY, mesh_of(rank, size, **options).cut)
        state = transform.init(parts)
        found = transform.update(tree.map(torch.sin, parts), state, parts, torch.tensor(1))
        assert_same_bits(assembled(size, found[:2]), tree.paths((expected, after)))


@pytest.mark.slow
def test_matrices_that_tensor_parallelism_cuts_are_gathered_too() -> None:
    on_ranks(4, check_tensor)


def check_slices(rank: int, size: int) -> None:
    mesh = mesh_of(rank, size, sharding="fsdp")
    alone, _ = computed_once(rank, train, mesh_of(0, 1), muon(), traced=False)
    state, _ = train(mesh, muon("elements"), traced=False)
    found, truth = assembled(size, state.params), tree.paths(alone.params)
    assert not torch.equal(found["layers.0.query"], truth["layers.0.query"])
    whole, _ = train(mesh, muon("everything"), traced=False)
    assert_same_bits(assembled(size, whole), tree.paths(alone))
    kept = tree.paths(whole.optimizer, is_shard)
    assert kept["1.1.0.momentum.layers.0.query"].dim is not None
    assert kept["1.1.0.gram.layers.0.key"].shape == (16, 16)


def test_without_the_word_it_would_see_slices_and_with_everything_the_state_stays_cut_where_it_can() -> None:
    on_ranks(2, check_slices)
