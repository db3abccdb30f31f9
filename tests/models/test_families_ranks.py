"""Every family on two ranks: cut by tensor parallelism, and its layers gathered one at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch

from fnrecipe import random, tree
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.noise import Noise
from fnrecipe.nn.objective import Objective
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.transforms import gradients
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, documents, packed
from tests.ranks import assembled, mesh_of, on_ranks

from .families import TINY, random_params, tiny

BATCH = packed([documents(9, 14), documents(24)], 24)
POLICIES = {"tensor": Policy(), "fsdp": Policy(), "fsdp, selective": Policy(remat="selective")}
PLAIN: dict[str, Any] = {"noise": Noise()}
WITH_ALL: dict[str, Any] = {
    "noise": Noise(dropout=0.2, neftune=5.0),
    "objective": Objective(label_smoothing=0.1, z_loss=0.01),
    "length_normalization": True,
}
"""All that a loss may have."""


def found(
    mesh: Mesh, family: str, config: Any, params: Tree, policy: Policy, *, noise: Noise, **options: Any
) -> tuple[Tree, Any]:
    """Gradients, cut over the ranks, and sums of the loss."""
    share = 2 // mesh.shard.size
    apply = find_model(family).noisy
    assert apply is not None
    loss = next_token_loss(partial(apply, config, policy=policy, scope="document", noise=noise), **options)
    cut = {}
    for path, leaf in tree.paths(params).items():
        node = cut
        *parents, name = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = mesh.cut(path, leaf)
    rows = BATCH if mesh.shard.size == 1 else tree.map(lambda leaf: leaf[mesh.shard.index : mesh.shard.index + 1], BATCH)
    result: tuple[Tree, Any] = gradients(loss, share, mesh)(cut, rows, random.key(0))
    return result


def check(rank: int, size: int) -> None:
    for family in TINY:
        model, config = find_model(family), tiny(family, num_layers=2)
        params = random_params(model, config)
        for given in (PLAIN, WITH_ALL) if family in ("llama", "gemma2") else (PLAIN,):
            check_family(rank, size, family, params, given)


def check_family(rank: int, size: int, family: str, params: Tree, given: dict[str, Any]) -> None:
    model, config = find_model(family), tiny(family, num_layers=2)
    alone, sums = found(mesh_of(0, 1), family, config, params, Policy(), **given)
    truth = tree.paths(alone)
    for name, policy in POLICIES.items():
        options = {"tensor_parallel_size": 2} if name == "tensor" else {"sharding": "fsdp"}
        mesh = attrs.evolve(mesh_of(rank, size, **options), rules=model.rules(config))
        gradient, others = found(mesh, family, config, params, policy, **given)
        whole = assembled(size, gradient)
        if name == "fsdp":
            assert_same_bits(whole, truth)
            assert_same_bits(others, sums)
        else:
            largest = max(leaf.abs().max() for leaf in truth.values())
            kept = {path for path, leaf in truth.items() if leaf.abs().max() > 1e-6 * largest}
            assert_close({path: whole[path] for path in kept}, {path: truth[path] for path in kept}, 1e-4)
            assert others.keys() == sums.keys()
            for key, value in sums.items():
                torch.testing.assert_close(others[key], value, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    on_ranks(2, check)
