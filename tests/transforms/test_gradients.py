"""Every sharding, at every number of ranks, trains what one process trains: bit for bit; under tensor parallelism nearly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.compiler import Backend, inductor, trace
from fnrecipe.data import Batch
from fnrecipe.loss import Sums
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim.average import Averaging
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.partition import everything
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.process_groups import lane_assignment
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import evaluation, jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_close, assert_same_bits, documents, packed
from tests.ranks import assembled, compiles_gathers, computed_once, mesh_of, on_ranks

LEAVES = 8
FEW = 4
"""Leaves where two ranks are traced: two microbatches each take half as long to trace as four, and are summed alike."""

POISON = 63
KEY = random.key(0)
RATE = cosine_annealing(0.01, num_warmup_steps=2, num_steps=5, final_scale=0.1)
FUSED = optim.adamw(RATE, max_norm=1.0)
UPDATES = {
    "fused": FUSED,
    "chain": attrs.evolve(FUSED, fused_update=None),
    "sgd": optim.chain(optim.clip_by_global_norm(0.1), optim.scale_by_learning_rate(RATE)),
}
CONFIG = attrs.evolve(TINY, tied_embeddings=False)
MODES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "zero1": {"sharding": "zero1"},
    "zero2": {"sharding": "zero2"},
    "fsdp": {"sharding": "fsdp"},
}
HYBRID: dict[str, dict[str, Any]] = {
    "hybrid zero1": {"sharding": "zero1", "shard_size": 2},
    "hybrid fsdp": {"sharding": "fsdp", "shard_size": 2},
}
TENSOR: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor and fsdp": {"tensor_parallel_size": 2, "sharding": "fsdp"},
    "tensor and zero1": {"tensor_parallel_size": 2, "sharding": "zero1"},
}


def chosen(*names: str) -> dict[str, dict[str, Any]]:
    """Some of the modes."""
    return {name: (MODES | HYBRID | TENSOR)[name] for name in names}


def loss(params: Tree, batch: Batch, key: Tensor | None, policy: Policy = Policy()) -> tuple[Tensor, Sums]:
    """The loss, which is not finite for a leaf with a POISON in it."""
    total, sums = next_token_loss(partial(llama.apply, CONFIG, policy=policy))(params, batch)
    bad = torch.where((batch.tokens == POISON).any(), torch.nan, 1.0)
    return total * bad, {**sums, "loss": sums["loss"] * bad}


def batch(number: int) -> Batch:
    """Eight rows with unequal numbers of targets, one of them empty; the third batch is poisoned in its sixth row."""
    lengths = [() if row == 3 else (3 + row, 7 - row // 2) for row in range(8)]
    rows = packed([documents(*pair, vocab_size=POISON, seed=8 * number + row) for row, pair in enumerate(lengths)], 16)
    if number == 2:
        rows.tokens[5, 4] = POISON
    return rows


def train(
    mesh: Mesh,
    update: Transform,
    traced: bool,
    policy: Policy = Policy(),
    dtype: torch.dtype = torch.float32,
    scaling: LossScaling | None = None,
    trains: optim.Mask = everything,
    loss: Any = loss,
    leaves: int = LEAVES,
    averaging: Averaging | None = None,
) -> tuple[State, list[Any]]:
    """The state after five steps, and the metrics of all steps and of an evaluation; `dtype` is that of the parameters."""
    share = leaves // (mesh.replica.size * mesh.shard.size)
    function = partial(loss, policy=policy)
    step = train_step(function, update, share, mesh, scaling, trains, averaging)
    evaluate = evaluation(function, share, mesh)
    if traced:
        step, evaluate = jit(step, donate=1), jit(evaluate)
    params = llama.init(CONFIG, KEY, lambda path, leaf: mesh.cut(path, leaf.to(dtype)))
    state, rows, found = init_state(params, update, KEY, scaling, trains, averaging), lane_assignment(mesh, leaves).lanes(8), []
    for number in range(5):
        state, metrics = step(state, tree.map(lambda leaf: leaf[rows], batch(number)))
        found.append(metrics)
    return state, [*found, evaluate(state.params, tree.map(lambda leaf: leaf[rows], batch(7)))]


def check(
    rank: int, size: int, modes: Mapping[str, dict[str, Any]], updates: list[str], traced: bool, leaves: int = LEAVES
) -> None:
    for update in updates:
        alone, metrics = computed_once(rank, train, mesh_of(0, 1), UPDATES[update], traced=False, leaves=leaves)
        assert [row.get("skipped", 0) for row in metrics] == [0, 0, 1, 0, 0, 0]
        assert [row["targets"] for row in metrics] == [84] * 6
        truth = tree.paths(alone)
        for options in modes.values():
            state, found = train(mesh_of(rank, size, **options), UPDATES[update], traced, leaves=leaves)
            if "tensor_parallel_size" in options:
                assert_close(tree.map(Tensor.double, assembled(size, state)), tree.map(Tensor.double, truth), 1e-3)
                assert_close(_numbers(found), _numbers(metrics), 1e-5)
            else:
                assert_same_bits(assembled(size, state), truth)
                assert_same_bits(found, metrics)


def _numbers(rows: list[Any]) -> Tree:
    return [tree.map(lambda leaf: torch.nan_to_num(leaf.double()), row) for row in rows]


def check_updates(rank: int, size: int) -> None:
    check(rank, size, MODES | {"tensor": TENSOR["tensor"]}, ["fused"], False)
    check(rank, size, chosen("zero1", "fsdp"), ["chain", "sgd"], False)


def test_two_ranks_eagerly() -> None:
    on_ranks(2, check_updates)


def test_two_ranks_traced() -> None:
    on_ranks(2, check, chosen("zero1", "zero2", "fsdp", "tensor"), ["fused"], True, FEW)


def check_computed(rank: int, size: int) -> None:
    policy = Policy(torch.bfloat16, "selective", logits_at_once=7)
    alone, metrics = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False, policy=policy, leaves=FEW)
    state, found = train(mesh_of(rank, size, sharding="fsdp"), FUSED, traced=True, policy=policy, leaves=FEW)
    assert_same_bits(assembled(size, state), tree.paths(alone))
    assert_same_bits(found, metrics)


@pytest.mark.slow
def test_ranks_that_gather_pieces_of_layers_have_the_bits_of_one_process_in_half_precision_too() -> None:
    on_ranks(2, check_computed)


@pytest.mark.slow
def test_four_ranks_eagerly_and_traced() -> None:
    on_ranks(4, check, HYBRID, ["chain"], False)
    on_ranks(4, check, TENSOR, ["chain"], False, FEW)
    on_ranks(4, check, {"tensor": TENSOR["tensor and fsdp"]}, ["fused"], True, FEW)


@pytest.mark.slow
def test_eight_ranks_eagerly() -> None:
    on_ranks(8, check, chosen("replicate", "zero2", "fsdp", "hybrid fsdp"), ["fused"], False)


HALF: dict[str, Any] = {"policy": Policy(torch.float16, logits_at_once=7), "scaling": LossScaling(2.0**14, 1.0, interval=1)}
PURE: dict[str, Any] = {"policy": Policy(torch.bfloat16, logits_at_once=7), "dtype": torch.bfloat16}


def check_precision(rank: int, size: int, options: dict[str, Any], modes: list[str], traced: bool) -> None:
    leaves = FEW if traced else LEAVES
    alone, metrics = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False, leaves=leaves, **options)
    if "scaling" in options:
        powers = [row["loss_scale"].log2() for row in metrics[:5]]
        assert powers == [14, 15, 14, 13, 14], "good, too much for float16, poisoned, good"
    for mode in modes:
        state, found = train(mesh_of(rank, size, **MODES[mode]), FUSED, traced, leaves=leaves, **options)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(found, metrics)


def check_precisions(rank: int, size: int) -> None:
    check_precision(rank, size, HALF, ["fsdp"], traced=False)
    check_precision(rank, size, PURE, ["replicate", "fsdp"], traced=False)


def test_two_ranks_have_the_bits_of_one_process_with_a_loss_scale_and_with_a_state_in_half_precision() -> None:
    on_ranks(2, check_precisions)


def check_precisions_traced(rank: int, size: int) -> None:
    check_precision(rank, size, HALF, ["zero2"], traced=True)
    check_precision(rank, size, PURE, ["zero1", "fsdp"], traced=True)


@pytest.mark.slow
def test_two_ranks_have_the_bits_of_one_process_in_half_precision_traced() -> None:
    on_ranks(2, check_precisions_traced)


def check_rounding(rank: int, size: int) -> None:
    rounded = {"parameter_dtype": "bfloat16"}
    alone, metrics = train(mesh_of(0, 1, **rounded), FUSED, traced=False)
    exact, _ = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False)
    assert any((a != b).any() for a, b in zip(tree.leaves(alone.params), tree.leaves(exact.params), strict=True))
    assert {leaf.dtype for leaf in tree.leaves(alone.params)} == {torch.float32}
    for options in MODES.values():
        state, found = train(mesh_of(rank, size, **options, **rounded), FUSED, traced=False)
        assert_same_bits(assembled(size, state), tree.paths(alone))
        assert_same_bits(found, metrics)


def test_parameters_gathered_in_half_precision_are_those_rounded_by_one_process() -> None:
    on_ranks(2, check_rounding)


def check_fast(rank: int, size: int) -> None:
    alone, metrics = computed_once(rank, train, mesh_of(0, 1), FUSED, traced=False)
    for options in MODES.values():
        state, found = train(mesh_of(rank, size, **options, reduction="fast"), FUSED, traced=False)
        assert_close(tree.map(Tensor.double, assembled(size, state)), tree.map(Tensor.double, tree.paths(alone)), 1e-3)
        assert_close(_numbers(found), _numbers(metrics), 1e-5)


def test_the_fast_reduction_is_the_same_within_rounding() -> None:
    on_ranks(2, check_fast)


def check_compiled(rank: int, size: int, modes: list[dict[str, Any]], backend: Backend) -> None:
    config, update, rows = attrs.evolve(CONFIG, num_layers=1), UPDATES["sgd"], packed([documents(5, 3), documents(2)], 16)
    for options in modes:
        mesh = mesh_of(rank, size, **options)
        states = [init_state(llama.init(config, KEY, mesh.cut), update, KEY) for _ in range(2)]
        step = train_step(next_token_loss(partial(llama.apply, config)), update, 1, mesh)
        graph, _ = trace(step, (states[0], rows), donate=1)
        runs = zip((backend(graph), graph), states, strict=True)
        found, expected = (run(*tree.leaves((state, rows))) for run, state in runs)
        assert_close(tree.map(Tensor.double, found), tree.map(Tensor.double, expected), 1e-4)


@compiles_gathers
def test_traced_steps_with_their_collectives_are_one_graph_to_torch_compile() -> None:
    on_ranks(
        2, check_compiled, [*MODES.values(), TENSOR["tensor"]], partial(torch.compile, fullgraph=True, backend="aot_eager")
    )


@compiles_gathers
@pytest.mark.slow
def test_inductor_compiles_the_step_with_gathers_in_its_layers() -> None:
    on_ranks(2, check_compiled, [MODES["fsdp"]], inductor)
