"""Adapters over ranks: gradients, and whole steps, are those of one rank."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from fnrecipe import optim, presets, random, tree
from fnrecipe.config import ModelSection
from fnrecipe.models import adapter
from fnrecipe.nn.policy import Policy
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.process_groups import lane_assignment
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import gradients
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, bits, documents, packed
from tests.ranks import assembled, computed_once, mesh_of, on_ranks

from .families import TINY
from .test_adapter import DORA, LORA, is_adapter, loss_of, params_of, section

ROWS = packed([documents(9, 14), documents(24), documents(5, 17), documents(11)], 24)
WAYS: dict[str, tuple[dict[str, Any], Policy]] = {
    "tensor": ({"tensor_parallel_size": 2}, Policy()),
    **{mode: ({"sharding": mode}, Policy()) for mode in ("zero1", "zero2", "fsdp")},
    "fsdp, selective": ({"sharding": "fsdp"}, Policy(remat="selective", logits_at_once=7)),
}
ADAMW = optim.adamw(cosine_annealing(0.01, num_warmup_steps=2, num_steps=5, final_scale=0.1), weight_decay=0.1, max_norm=0.2)


def found(mesh: Mesh, model: ModelSection, params: Tree, policy: Policy) -> tuple[Tree, Any]:
    """Gradients of the adapter, cut over the ranks, and sums of the loss, of two rows."""
    share = 2 // mesh.shard.size
    rows = tree.map(lambda leaf: leaf[mesh.shard.index * share :][:share], ROWS)
    compute = gradients(loss_of(model, policy), share, mesh, is_adapter)
    result: tuple[Tree, Any] = compute(cut(mesh, params), rows, random.key(0))
    return result


def cut(mesh: Mesh, params: Tree) -> Tree:
    return adapter.nested({path: mesh.cut(path, leaf) for path, leaf in tree.paths(params).items()})


def check(rank: int, size: int, families: list[str]) -> None:
    for family in families:
        for given in (LORA, attrs.evolve(DORA, dropout=0.3)):
            model = section(family, given, num_layers=2)
            params = params_of(model)
            policies = dict.fromkeys(policy for _, policy in WAYS.values())
            expected = {policy: computed_once(rank, found, mesh_of(0, 1), model, params, policy) for policy in policies}
            for name, (options, policy) in WAYS.items():
                alone, sums = expected[policy]
                mesh = attrs.evolve(mesh_of(rank, size, **options), rules=presets.rules(model))
                gradient, others = found(mesh, model, params, policy)
                whole = assembled(size, gradient)
                if name == "tensor":
                    assert_close(whole, tree.paths(alone), 1e-4)
                    torch.testing.assert_close(others["loss"], sums["loss"], rtol=1e-5, atol=0)
                else:
                    assert_same_bits(whole, tree.paths(alone))
                    assert_same_bits(others, sums)


def test_two_ranks_compute_what_one_does() -> None:
    on_ranks(2, check, ["llama"])


@pytest.mark.slow
def test_two_ranks_compute_what_one_does_in_other_families() -> None:
    on_ranks(2, check, [family for family in TINY if family != "llama"])


def stepped(mesh: Mesh, model: ModelSection) -> tuple[State, list[Any]]:
    """The state after three steps of four microbatches, and their metrics."""
    ranks = mesh.replica.size * mesh.shard.size
    step = train_step(loss_of(model), ADAMW, 4 // ranks, mesh, trains=is_adapter)
    state, metrics = init_state(cut(mesh, params_of(model)), ADAMW, random.key(0), trains=is_adapter), []
    rows = tree.map(lambda leaf: leaf[lane_assignment(mesh, 4).lanes(4)], ROWS)
    for _ in range(3):
        state, shown = step(state, rows)
        metrics.append(shown)
    return state, metrics


def check_steps(rank: int, size: int, modes: list[dict[str, Any]]) -> None:
    for given in (attrs.evolve(LORA, rank=4, dropout=0.3), DORA):  # four rows: one for each of four ranks
        model = section("llama", given, num_layers=2)
        begun = tree.paths(params_of(model))
        alone, metrics = computed_once(rank, stepped, mesh_of(0, 1, num_microbatches=4), model)
        moved = {path for path, leaf in tree.paths(alone.params).items() if bits(leaf) != bits(begun[path])}
        assert moved == {path for path, leaf in begun.items() if is_adapter(path, leaf)}
        for options in modes:
            state, shown = stepped(mesh_of(rank, size, num_microbatches=4, **options), model)
            assert_same_bits(assembled(size, state), tree.paths(alone))
            assert_same_bits(shown, metrics)


def test_two_ranks_leave_the_state_that_one_leaves() -> None:
    on_ranks(2, check_steps, [{}, {"sharding": "zero1"}, {"sharding": "zero2"}, {"sharding": "fsdp"}])


def test_four_ranks_leave_the_state_that_one_leaves() -> None:
    on_ranks(4, check_steps, [{"sharding": "fsdp"}, {"sharding": "fsdp", "shard_size": 2}])
