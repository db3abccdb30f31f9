"""The key of a loss: another one for each microbatch of each step, the same at any number of ranks and under any sharding."""

from __future__ import annotations

from itertools import chain, product
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.data import Batch
from fnrecipe.loss import Sums
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.runtime.process_groups import lane_assignment
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import evaluation
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits
from tests.ranks import assembled, computed_once, mesh_of, on_ranks
from tests.transforms.test_gradients import FEW, FUSED, HYBRID, KEY, LEAVES, MODES, chosen, train
from tests.transforms.test_gradients import loss as without_dropout


def with_dropout(params: Tree, batch: Batch, key: Tensor | None, policy: Policy = Policy()) -> tuple[Tensor, Sums]:
    """The loss of rows of which a fifth of the tokens is dropped."""
    if key is not None:
        dropped = random.uniform(key, *batch.tokens.shape) < 0.2
        batch = attrs.evolve(batch, tokens=torch.where(dropped, 0, batch.tokens))
    return without_dropout(params, batch, key, policy)


def check(rank: int, size: int, modes: dict[str, Any], traced: bool) -> None:
    leaves = FEW if traced else LEAVES
    alone, metrics = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False, loss=with_dropout, leaves=leaves)
    plain, plain_metrics = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False, leaves=leaves)
    assert metrics[0]["loss"] != plain_metrics[0]["loss"]
    assert not torch.equal(tree.leaves(alone.params)[0], tree.leaves(plain.params)[0])
    for options in modes.values():
        state, found = train(mesh_of(rank, size, **options), FUSED, traced, loss=with_dropout, leaves=leaves)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(found, metrics)


def check_traced(rank: int, size: int) -> None:
    check(rank, size, MODES, False)
    check(rank, size, chosen("fsdp"), True)


def test_two_ranks_drop_what_one_process_drops_eagerly_and_traced() -> None:
    on_ranks(2, check_traced)


@pytest.mark.slow
def test_four_ranks_drop_what_one_process_drops() -> None:
    on_ranks(4, check, HYBRID, False)


def test_each_microbatch_of_each_step_has_a_key_of_its_own_and_an_evaluation_none() -> None:
    seen: list[Any] = []

    def note(params: Tree, batch: Tensor, key: Tensor | None) -> tuple[Tensor, Sums]:
        seen.append(None if key is None else tuple(key.tolist()))
        total = (params["w"] * batch).sum()
        return total, {"loss": total, "targets": torch.tensor(batch.numel())}

    state = init_state({"w": torch.ones(())}, FUSED, KEY)
    step = train_step(note, FUSED, 4)
    for _ in range(3):
        state, _ = step(state, torch.ones(8))
    of_step = [random.fold_in(random.fold_in(KEY, "loss"), number) for number in (1, 2, 3)]
    expected = [tuple(random.fold_in(key, number).tolist()) for key in of_step for number in range(4)]
    assert seen == expected
    assert len(set(seen)) == 12
    evaluation(note, 2)(state.params, torch.ones(8))
    assert seen[12:] == [None, None]


def test_microbatches_are_numbered_as_lanes_are_assigned() -> None:
    for (replicas, shard), sharding in product([(1, 1), (2, 1), (1, 2), (2, 2), (1, 8), (4, 2)], MODES):
        meshes = [
            Mesh(Axis("replica", replicas, replica), Axis("shard", shard, index), sharding=sharding)  # type: ignore[arg-type]
            for replica, index in product(range(replicas), range(shard))
        ]
        numbers = [list(mesh.microbatches(LEAVES // (replicas * shard))) for mesh in meshes]
        assert numbers == [lane_assignment(mesh, LEAVES).lanes(LEAVES) for mesh in meshes]
        assert sorted(chain(*numbers)) == list(range(LEAVES))
