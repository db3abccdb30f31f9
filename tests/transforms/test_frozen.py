"""Frozen parameters: nothing is computed for them, nothing moves them, and the others train as if they were constants."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe import optim, tree
from fnrecipe.compiler import trace
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.errors import UsageError
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.process_groups import lane_assignment
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit
from tests.helpers import assert_close, assert_same_bits, bits
from tests.ranks import assembled, computed_once, mesh_of, on_ranks
from tests.transforms.test_gradients import CONFIG, FEW, FUSED, KEY, LEAVES, MODES, UPDATES, batch, chosen, train

ADAMW = optim.adamw(
    cosine_annealing(0.01, num_warmup_steps=2, num_steps=5, final_scale=0.1), betas=(0.9, 0.95), weight_decay=0.1, max_norm=0.2
)
LOSS = next_token_loss(partial(llama.apply, CONFIG))
FROZEN = ("embedding", "layers.0.", "layers.1.query", "layers.1.up", "layers.1.attention_norm", "head")


def trains(path: str, parameter: Tensor) -> bool:
    return not path.startswith(FROZEN)


def by_torch(steps: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters after some steps of torch's autograd, clipping and AdamW, and the norms of their gradients."""
    params = llama.init(CONFIG, KEY)
    leaves = tree.paths(params)
    for path, leaf in leaves.items():
        leaf.requires_grad_(trains(path, leaf))
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) is decays]} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"] = 0.1, 0.0
    norms, rate = [], cosine_annealing(0.01, num_warmup_steps=2, num_steps=5, final_scale=0.1)
    for step in range(1, steps + 1):
        rows = batch(step + 10)
        logits = llama.apply(CONFIG, params, rows.tokens, rows.segments, rows.positions)
        optimizer.zero_grad()
        F.cross_entropy(logits[rows.mask], rows.targets[rows.mask]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 0.2))
        for group in optimizer.param_groups:
            group["lr"] = rate(torch.tensor(step)).item()
        optimizer.step()
    return {path: leaf.detach() for path, leaf in leaves.items()}, norms


@pytest.mark.parametrize("policy", [Policy(), Policy(remat="layerwise", logits_at_once=7)], ids=["plain", "remat, chunks"])
@pytest.mark.parametrize("traced", [False, True])
def test_they_are_torchs_parameters_without_gradients(traced: bool, policy: Policy) -> None:
    expected, norms = by_torch(4)
    loss = next_token_loss(partial(llama.apply, CONFIG, policy=policy))
    step = train_step(loss, ADAMW, 2, trains=trains)
    step = jit(step, donate=1) if traced else step
    start = llama.init(CONFIG, KEY)
    state = init_state(llama.init(CONFIG, KEY), ADAMW, KEY, trains=trains)
    addresses = {path: leaf.data_ptr() for path, leaf in tree.paths(state.params).items()}
    for number in range(1, 5):
        state, metrics = step(state, batch(number + 10))
        torch.testing.assert_close(metrics["grad_norm"], norms[number - 1])
    assert_close(tree.paths(state.params), expected, 1e-3)
    for path, leaf in tree.paths(start).items():
        same = bits(tree.paths(state.params)[path]) == bits(leaf)
        assert same is not trains(path, leaf), path
        if not trains(path, leaf):
            assert tree.paths(state.params)[path].data_ptr() == addresses[path]
    trained = {path for path, leaf in tree.paths(start).items() if trains(path, leaf)}
    assert tree.paths(state.optimizer).keys() == {f"1.{kind}.{path}" for kind in ("mean", "square") for path in trained} | {
        "1.count"
    }


def check(rank: int, size: int, modes: dict[str, Any], update: str, traced: bool, policy: Policy, leaves: int = LEAVES) -> None:
    same = partial(train, update=UPDATES[update], policy=policy, trains=trains, leaves=leaves)
    alone, metrics = computed_once(rank, same, mesh_of(0, 1), traced=False)
    for options in modes.values():
        state, found = same(mesh_of(rank, size, **options), traced=traced)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(found, metrics)


def test_two_ranks_eagerly() -> None:
    on_ranks(2, check, MODES, "fused", False, Policy())


def test_two_ranks_traced() -> None:
    on_ranks(2, check, chosen("zero1", "fsdp"), "chain", True, Policy(logits_at_once=7), FEW)


@pytest.mark.slow
def test_four_ranks() -> None:
    on_ranks(4, check, chosen("hybrid fsdp"), "fused", True, Policy(remat="selective"), FEW)


def counts(graph: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in all_nodes(graph) if node.op == "call_function")


def step_graph(mask: optim.Mask, policy: Policy = Policy(), mesh: Mesh = Mesh()) -> GraphModule:
    state = init_state(llama.init(CONFIG, KEY, mesh.cut), FUSED, KEY, trains=mask)
    rows = lane_assignment(mesh, mesh.shard.size).lanes(8)
    step = train_step(next_token_loss(partial(llama.apply, CONFIG, policy=policy)), FUSED, 1, mesh, trains=mask)
    return trace(step, (state, tree.map(lambda leaf: leaf[rows], batch(0))), donate=1)[0]


@pytest.mark.parametrize("policy", [Policy(), Policy(logits_at_once=50)], ids=["logits", "deferred logits"])
def test_no_product_is_computed_for_the_gradient_of_a_frozen_weight(policy: Policy) -> None:
    def products(mask: optim.Mask) -> int:
        return sum(number for name, number in counts(step_graph(mask, policy)).items() if "mm" in name)

    chunks = 3 if policy.logits_at_once else 1
    layer, layers = 7, CONFIG.num_layers
    forward = layer * layers + chunks
    assert products(lambda path, leaf: True) == 3 * forward
    assert products(lambda path, leaf: path == "norm") == forward + chunks, "only through the head"
    assert products(lambda path, leaf: path == "layers.1.down") == forward + chunks + 1, "and for that weight itself"


def test_a_frozen_weight_is_not_copied_and_its_state_is_not_there() -> None:
    graph = step_graph(trains)
    frozen = sum(not trains(path, leaf) for path, leaf in tree.paths(llama.init(CONFIG, KEY)).items())
    params = list(graph.graph.find_nodes(op="placeholder"))[: len(tree.leaves(llama.init(CONFIG, KEY)))]
    untouched = [
        node for node in params if not any("copy_" in str(user.target) or "adamw" in str(user.target) for user in node.users)
    ]
    assert len(untouched) == frozen


def check_sums(rank: int, size: int) -> None:
    def bytes_summed(mask: optim.Mask, sharding: str) -> int:
        graph = step_graph(mask, mesh=mesh_of(rank, size, sharding=sharding, num_microbatches=size))
        sums = [node for node in graph.graph.nodes if "all_to_all" in str(node.target)]
        return sum(node.meta["val"].nbytes for node in sums)

    params = tree.paths(llama.init(CONFIG, KEY))
    trained = sum(leaf.nbytes for path, leaf in params.items() if trains(path, leaf))
    every = sum(leaf.nbytes for leaf in params.values())
    for sharding in ("zero1", "zero2", "fsdp"):
        assert bytes_summed(lambda path, leaf: True, sharding) == pytest.approx(every, rel=0.01)
        assert bytes_summed(trains, sharding) == pytest.approx(trained, rel=0.01)


def test_gradients_of_frozen_parameters_are_not_summed_over_ranks() -> None:
    on_ranks(2, check_sums)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UsageError, match="trains: expected a parameter for which it holds, found none"):
        init_state(llama.init(CONFIG, KEY), FUSED, KEY, trains=lambda path, parameter: False)
