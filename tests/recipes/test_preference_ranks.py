"""Steps of preference optimization over ranks, the frozen reference model cut like the model: the bits of one rank."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import build, tree
from fnrecipe.config import resolve
from fnrecipe.recipes.preference.config import config
from fnrecipe.recipes.preference.train import recipe
from fnrecipe.runtime.process_groups import lane_assignment
from tests.helpers import assert_same_bits, bits
from tests.ranks import assembled, mesh_of, on_ranks
from tests.recipes.test_preference_runs import given

CPU = torch.device("cpu")


def check(rank: int, size: int, pairs: list[str], criterion: str, modes: list[dict[str, Any]]) -> None:
    """Three steps of four microbatches on `size` ranks."""

    def trained(ranks: int, **options: Any) -> tuple[Any, Any, list[Any]]:
        gang = [f"gang.{key}={value}" for key, value in options.items()]
        resolved = resolve(config, pairs=[*pairs, "trainer.jit=off", "gang.num_microbatches=4", *gang])[0]
        mesh = mesh_of(rank if ranks > 1 else 0, ranks, num_microbatches=4, **options)
        step = build.make_step(recipe, resolved, mesh, CPU)
        state, metrics = build.init_train_state(recipe, resolved, mesh, CPU), []
        begun = {path: bits(leaf) for path, leaf in tree.paths(state.params).items()}
        stream = build.batches(recipe, resolved, lane_assignment(mesh, 4), CPU)(None)
        for batch, _ in islice(stream, 3):
            state, shown = step(state, batch)
            metrics.append(shown)
        return begun, state, metrics

    begun, alone, metrics = trained(1)
    stays = {path for path, leaf in tree.paths(alone.params).items() if bits(leaf) == begun[path]}
    assert stays == {path for path in begun if path.startswith("reference.")}
    assert bool(stays) == (criterion in ("dpo", "kto"))
    for options in modes:
        _, state, shown = trained(size, **options)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(shown, metrics)


def test_two_ranks_leave_the_state_that_one_leaves(tmp_path: Path) -> None:
    on_ranks(2, check, given(tmp_path, "dpo"), "dpo", [{"sharding": mode} for mode in ("replicate", "zero1", "zero2", "fsdp")])


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["dpo", "kto", "orpo"])
def test_four_ranks_leave_the_state_that_one_leaves(tmp_path: Path, criterion: str) -> None:
    modes = [{"sharding": "fsdp"}, {"sharding": "fsdp", "shard_size": 2}]
    on_ranks(4, check, given(tmp_path, criterion), criterion, modes)
