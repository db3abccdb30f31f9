"""Updates that are not finite: none is made, whoever makes it and however the state is cut, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.compiler import inductor
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.partition import everything
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.finite import finite, largest
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit, unshard
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits, bits, compiles, end, pairs, start
from tests.ranks import assembled, mesh_of, on_ranks

KEY, YES = random.key(2), torch.tensor(True)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
WIDE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def constant(rate: float) -> Callable[[Tensor], Tensor]:
    return lambda step: torch.tensor(rate, dtype=torch.float64)


def are_finite(values: Tree) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree.leaves(values))


@given(st.lists(st.floats(width=32), max_size=4), st.lists(st.floats(width=32), max_size=4))
def test_numbers_are_finite_if_torch_says_so_of_each(first: list[float], second: list[float]) -> None:
    values = {"a": torch.tensor(first), "b": torch.tensor(second), "n": torch.tensor(3)}
    assert finite(values, values, values) == are_finite(values)
    if are_finite(values):
        assert largest(values, values) == max(map(abs, [*first, *second]), default=0)


def test_what_bfloat16_would_round_up_to_infinity_is_not_finite() -> None:
    large, half = torch.tensor([3.4e38]), torch.zeros(1, dtype=torch.bfloat16)
    assert finite(large, large, large)
    assert not finite(large, half, large)
    assert finite(torch.tensor([torch.finfo(torch.bfloat16).max]), half, large)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "chain"])
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE.keys())
@settings(deadline=None, max_examples=60)
@given(
    numbers=st.tuples(*[st.lists(FLOATS, min_size=3, max_size=3)] * 4),
    rate=st.sampled_from([0.0, 1e-3, 1.0, 1e10, 1e30, 1e38, 1e39, 1e300]) | FLOATS,
    eps=st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-8, 1.0, 1e30]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.0), (0.999, 0.9999999), (0.9999999, 0.9)]),
    decay=st.sampled_from([0.0, 0.1, 1e30, 1e38]),
    max_norm=st.sampled_from([None, 1.0, 1e30]),
)
def test_adamw_keeps_every_finite_state_finite_or_as_it_is(
    fused: bool, dtype: torch.dtype, numbers: Any, rate: float, eps: float, betas: Any, decay: float, max_norm: float | None
) -> None:
    limit = torch.finfo(dtype).max
    params, mean, square, gradient = (torch.tensor(values).clamp(-limit, limit) for values in numbers)
    transform = optim.adamw(constant(rate), eps=eps, betas=betas, weight_decay=decay, mask=everything, max_norm=max_norm)
    transform = transform if fused else attrs.evolve(transform, fused_update=None)
    given = {"w": params.to(dtype)}
    state = transform.init(given)
    (moments,) = (part for part in state if part)
    moments |= {"mean": {"w": mean.to(dtype)}, "square": {"w": square.abs().to(dtype)}, "count": torch.tensor(4)}
    found = optim.mean_gradient({"w": gradient}, torch.tensor(1))
    where = torch.isfinite(found.norm)
    new, after, _, made = optim.guarded_update(transform, found, state, given, torch.tensor(5), where, KEY)
    assert are_finite((new, after))
    if not made:
        assert_same_bits((new, after), (given, state))


@settings(deadline=None)
@given(
    st.tuples(*[st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2)] * 3),
    st.floats(1e-12, 1e-3),
    st.floats(0, 10),
)
def test_adamw_makes_every_update_of_ordinary_size(numbers: Any, eps: float, rate: float) -> None:
    params, mean, gradient = ({"w": torch.tensor(values)} for values in numbers)
    transform = optim.adamw(constant(rate), eps=eps, max_norm=1.0)
    state = transform.init(params)
    (moments,) = (part for part in state if part)
    moments["mean"] = mean
    *_, made = optim.guarded_update(
        transform, optim.mean_gradient(gradient, torch.tensor(1)), state, params, torch.tensor(1), YES, KEY
    )
    assert made


def linear(params: Tree, batch: Tensor, key: Tensor | None) -> tuple[Tensor, Any]:
    total = (params["w"] * batch).sum()
    return total, {"loss": total, "targets": torch.tensor(1)}


def at_third_step(number: float, kind: str) -> Transform:
    """Writes `number` into one element of the update, or of what it keeps itself, at the third step."""

    def update(updates: Tree, state: Any, params: Tree, step: Tensor) -> tuple[Tree, Any, Any]:
        spoil = torch.where((step == 3) & (torch.arange(len(updates["w"])) == 1), number, 0.0)
        updates = {"w": updates["w"] + spoil} if kind == "update" else updates
        return updates, {"seen": state["seen"] + (spoil if kind == "state" else 1.0)}, {}

    return Transform(lambda params: {"seen": torch.zeros_like(params["w"])}, update)


def as_whole(transform: Transform) -> Transform:
    """The transform with an `apply` of its own, which selects and does not look at what it makes."""

    def apply(gradients: Any, state: Any, params: Tree, step: Tensor, where: Tensor, key: Tensor) -> tuple[Tree, Any, Any]:
        divided = tree.map(lambda g: g / gradients.count, gradients.total)
        updates, after, report = transform.update(divided, state, params, step)
        return *tree.select(where, (optim.apply_updates(params, updates), after), (params, state)), report

    return attrs.evolve(transform, fused_update=apply)


WRAPS: dict[str, Any] = {
    "eager": lambda step: step,
    "traced": partial(jit, donate=1),
}
RATE = constant(0.01)
BATCHES = [torch.tensor([1.0, -2.0, 3.0, 0.5]) * (number + 1) for number in range(4)]


def trained(update: Transform, wrap: Any, dtype: torch.dtype, batches: Any, scaling: LossScaling | None = None) -> Any:
    """Copies of the states before the first and after each step, and the metrics."""
    step = wrap(train_step(linear, update, scaling=scaling))
    state = init_state({"w": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype)}, update, KEY, scaling)
    states, rows = [tree.map(torch.clone, state)], []
    for batch in batches:
        state, metrics = step(state, batch)
        states.append(tree.map(torch.clone, state))
        rows.append(tree.map(torch.clone, metrics))
    return states, rows


@pytest.mark.parametrize("wrap", ["eager", "traced"])
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("kind", ["update", "state"])
@pytest.mark.parametrize("scaling", [None, LossScaling(8.0, 1.0)], ids=["", "scaled"])
def test_a_step_whose_update_is_not_finite_is_skipped_and_leaves_no_trace(
    wrap: str, dtype: torch.dtype, kind: str, scaling: LossScaling | None
) -> None:
    update = optim.chain(optim.scale_by_adam(), at_third_step(torch.inf, kind), optim.scale_by_learning_rate(RATE))
    states, metrics = trained(update, WRAPS[wrap], dtype, BATCHES, scaling)
    assert [row["skipped"].item() for row in metrics] == [0, 0, 1, 0]
    assert all(row["loss"].isfinite() and row["grad_norm"].isfinite() for row in metrics)
    assert_same_bits((states[3].params, states[3].optimizer), (states[2].params, states[2].optimizer))
    never_saw = attrs.evolve(states[2], step=states[3].step)
    after, _ = WRAPS[wrap](train_step(linear, update, scaling=scaling))(tree.map(torch.clone, never_saw), BATCHES[3])
    assert_same_bits((states[4].params, states[4].optimizer), (after.params, after.optimizer))
    if scaling is not None:
        assert [row["loss_scale"].item() for row in metrics] == [8.0] * 4, "the loss scale is not to blame"


@pytest.mark.parametrize("wrap", ["eager", "traced"])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_an_apply_that_knows_no_bounds_is_looked_at(wrap: str, number: float) -> None:
    spoilt, update = (
        optim.chain(at_third_step(value, "update"), optim.scale_by_learning_rate(RATE)) for value in (number, 0.0)
    )
    states, metrics = trained(as_whole(spoilt), WRAPS[wrap], torch.float32, BATCHES)
    without, _ = trained(update, WRAPS["eager"], torch.float32, [BATCHES[0], BATCHES[1], BATCHES[3]])
    assert [row["skipped"].item() for row in metrics] == [0, 0, 1, 0]
    assert bits(states[4].params["w"]) == bits(without[3].params["w"])


@pytest.mark.parametrize("wrap", ["eager", "traced"])
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("options", [{"rate": 1e39}, {"rate": 1e38, "eps": 1e-30}, {"eps": 0.0}], ids=str)
def test_adamw_that_would_overflow_is_skipped(wrap: str, dtype: torch.dtype, options: Any) -> None:
    update = optim.adamw(constant(options.get("rate", 0.1)), eps=options.get("eps", 1e-8), max_norm=1.0)
    states, metrics = trained(update, WRAPS[wrap], dtype, [batch * torch.tensor([1.0, 0.0, 1.0, 1.0]) for batch in BATCHES])
    assert [row["skipped"].item() for row in metrics] == [1, 2, 3, 4]
    assert_same_bits((states[4].params, states[4].optimizer), (states[0].params, states[0].optimizer))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "skipped"),
    [
        (optim.chain(at_third_step(torch.nan, "update"), optim.scale_by_learning_rate(RATE)), [0, 0, 1, 0]),
        (attrs.evolve(optim.adamw(constant(1e39)), fused_update=None), [1, 2, 3, 4]),
    ],
    ids=["looked at", "bounded"],
)
def test_compiled_it_is_skipped_too(update: Transform, skipped: list[int]) -> None:
    states, metrics = trained(update, partial(jit, donate=1, backend=inductor), torch.float32, BATCHES)
    assert [row["skipped"].item() for row in metrics] == skipped
    for before, after, row in zip(states, states[1:], metrics, strict=False):
        if row["skipped"]:
            assert_same_bits((after.params, after.optimizer), (before.params, before.optimizer))


@pytest.mark.slow
def test_a_run_that_is_not_finite_ends_with_status_3_and_a_line(texts: Path, tmp_path: Path) -> None:
    for changes, expected in [
        ({"optimizer__config__lr": 1e39}, "the update was not finite in 5 steps in a row"),
        ({"model__config__init_std": 1e38}, "the first state has numbers that are not finite: params.embedding"),
    ]:
        out = tmp_path / next(iter(changes))
        ended = end(start("train", "lm", "--out", str(out), "--config", *pairs(texts, **changes)))
        (line,) = ended.errors.splitlines()
        assert ended.status == 3
        assert line.startswith("error: ")
        assert expected in line


def of_one_element() -> Transform:
    """Divides by zero at the second step, where a parameter has the value 63: on one rank alone."""

    def update(updates: Tree, params: Tree, step: Tensor) -> tuple[Tree, Any]:
        return tree.map(lambda u, p: u / torch.where((p == 63) & (step == 2), 0.0, 1.0), updates, params), {}

    nothing = optim.stateless(lambda updates, params, step: (tree.map(torch.zeros_like, updates), {}))
    return optim.chain(nothing, optim.stateless(update))


def bounded(params: Tree, batch: Tensor, key: Tensor | None) -> tuple[Tensor, Any]:
    """A loss that is finite for all parameters."""
    total = torch.stack([leaf.tanh().sum() for leaf in tree.leaves(unshard(params))]).sum() * batch.sum()
    return total, {"loss": total, "targets": batch.sum()}


def check_ranks(rank: int, size: int) -> None:
    params = {"a": torch.arange(64.0).view(16, 4), "b": torch.arange(100.0, 103.0)}
    huge = {"a": params["a"].clone().index_put((torch.tensor(15), torch.tensor(3)), torch.tensor(3e38)), "b": params["b"]}
    other_rank = {"a": params["a"].flipud(), "b": params["b"]}
    shardings = "replicate", "zero1", "zero2", "fsdp"
    cases = [
        (of_one_element(), [(params, [0, 1, 0]), (other_rank, [0, 1, 0])]),
        (optim.adamw(RATE), [(huge, [1, 2, 3]), (params, [0, 0, 0])]),
    ]
    for (update, starts), sharding, wrap in product(cases, shardings, (WRAPS["eager"], WRAPS["traced"])):
        mesh = mesh_of(rank, size, sharding=sharding, num_microbatches=2)
        step = wrap(train_step(bounded, update, 2 // size, mesh))
        for first, expected in starts:
            start = {path: mesh.cut(path, leaf) for path, leaf in first.items()}
            state, skipped = init_state(start, update, KEY), []
            for _ in range(3):
                state, metrics = step(state, torch.ones(2 // size))
                skipped.append(metrics["skipped"].item())
            assert skipped == expected, (rank, sharding)
            assert are_finite((state.params, state.optimizer))
            if expected[-1] == 3:
                assert_same_bits(assembled(size, state.params), tree.paths(first))


def test_what_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    on_ranks(2, check_ranks)
