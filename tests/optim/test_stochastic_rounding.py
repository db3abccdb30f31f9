"""Stochastic rounding: its neighbours, its mean, its bits, and what is trained with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.compiler import trace
from fnrecipe.data import Batch
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import stochastic_rounding
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.parallel.mesh import Axis, Shard
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_same_bits, documents, packed

KEY = random.key(11)
SEED = stochastic_rounding.seed(KEY, torch.tensor(5))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127))


def rounded(values: Tensor, seed: Tensor = SEED, path: str = "w") -> Tensor:
    (found,) = stochastic_rounding.rounded([values], seed, path, values)
    return found


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 numbers at or below, and at or above float32 values, as float32."""
    nearest = values.bfloat16()
    down, up = (torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (-torch.inf, torch.inf))
    low, high = torch.where(nearest.float() > values, down, nearest), torch.where(nearest.float() < values, up, nearest)
    return low.float(), high.float()


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=50), st.integers(-(2**63), 2**63 - 1))
def test_the_result_is_one_of_the_two_neighbours_and_exact_values_stay(values: list[float], seed: int) -> None:
    given = torch.tensor(values)
    low, high = neighbours(given)
    found = rounded(given, torch.tensor(seed))
    assert found.dtype == torch.bfloat16
    assert ((found.float() == low) | (found.float() == high)).all()
    assert torch.equal(rounded(found.float(), torch.tensor(seed)), found)


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("start", "share"), [(1.0, 0.5), (1.0, 3 / 2**16), (3.0, 0.999), (2.0**-126, 0.1), (2.0**-130, 0.3)])
def test_the_mean_of_many_is_the_value(start: float, share: float, sign: int, slot: int) -> None:
    """Within five standard deviations of the mean of so many coins; the last start is no normal number."""
    low, number = torch.tensor(start, dtype=torch.bfloat16), 1 << 18
    unit = torch.nextafter(low, torch.full_like(low, 1e9)).double() - low.double()
    value = (sign * (low.double() + share * unit)).float()
    chance = ((value.double().abs() - low.double()) / unit).item()
    tensors = [*[torch.zeros(number)] * slot, value.expand(number).contiguous()]
    found = stochastic_rounding.rounded(tensors, SEED, "w", tensors[-1])[slot]
    ups = (found != sign * low).double().mean().item()
    assert abs(chance - share) < 1e-4
    assert abs(ups - chance) < 5 * (chance * (1 - chance) / number) ** 0.5


def fields(step: int = 5, path: str = "w") -> list[Tensor]:
    """The three numbers below 2**16 of each element."""
    bits = stochastic_rounding.random_bits(stochastic_rounding.seed(KEY, torch.tensor(step)), path, torch.empty(512, 512))
    return [(bits >> shift) & 0xFFFF for shift in (47, 31, 15)]


def deviation(numbers: Tensor, bins: int = 256) -> float:
    """By how many standard deviations the chi-square of so many bins is off, for numbers below 2**16 that may be uniform."""
    counts = torch.bincount(numbers.flatten() * bins >> 16, minlength=bins).double()
    mean = numbers.numel() / bins
    chi_square = ((counts - mean).square() / mean).sum().item()
    return abs(chi_square - (bins - 1)) / (2 * (bins - 1)) ** 0.5


def test_the_bits_are_uniform_and_those_of_one_element_tell_nothing_of_another() -> None:
    here, next_step, other = fields(), fields(6), fields(path="v")
    for number in range(3):
        mine = here[number]
        pairs = {
            "alone": mine,
            "low bits": (mine & 0xFF) << 8,
            "with the next element": mine[:, :-1] ^ mine[:, 1:],
            "with the next row": mine[:-1] ^ mine[1:],
            "with the next step": mine ^ next_step[number],
            "with another tensor": mine ^ other[number],
            "with another number": mine ^ here[number - 1],
        }
        assert {name: value for name, values in pairs.items() if (value := deviation(values)) > 4} == {}
    for bit in range(16):
        assert abs(((here[0] >> bit) & 1).double().mean().item() - 0.5) < 5 * 0.5 / 512


def test_numbers_that_are_not_uniform_are_found() -> None:
    assert deviation(torch.arange(1 << 16)) > 4
    assert deviation((fields()[0] * 0.99).long()) > 4


def parts(whole: Tensor, size: int, index: int) -> list[Any]:
    """What a rank may hold of a matrix: all, rows, columns, rows of columns."""
    shard, tensor = Axis("shard", size, index), Axis("tensor", 2, 1)
    rows, columns = (whole.chunk(size, dim)[index].contiguous() for dim in (0, 1))
    inner = whole.chunk(2, 1)[1].chunk(size, 0)[index].contiguous()
    return [
        Shard(whole, None, shard),
        Shard(rows, 0, shard),
        Shard(columns, 1, shard),
        Shard(Shard(inner, 0, shard), 1, tensor),
    ]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_is_rounded_as_in_the_whole(size: int) -> None:
    whole = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    expected = rounded(whole)
    for index in range(size):
        for part, same in zip(parts(whole, size, index), parts(expected, size, index), strict=True):
            (local,) = tree.leaves(part)
            assert torch.equal(stochastic_rounding.rounded([local], SEED, "w", part)[0], tree.leaves(same)[0])


def test_key_step_path_and_place_each_change_the_result() -> None:
    halves = torch.full((64,), 1 + 2.0**-8)  # half-way between two neighbours
    seeds = [stochastic_rounding.seed(KEY, torch.tensor(6)), stochastic_rounding.seed(random.key(12), torch.tensor(5))]
    found = [rounded(halves), rounded(halves, path="v"), *(rounded(halves, seed) for seed in seeds)]
    assert len({tuple(each.tolist()) for each in found}) == 4
    assert 0 < (found[0] == 1).sum() < 64


def test_no_more_tensors_than_there_are_bits() -> None:
    with pytest.raises(ValueError, match="expected at most 3 tensors, found 4"):
        stochastic_rounding.rounded([torch.zeros(2)] * 4, SEED, "w", torch.zeros(2))


ADAMW = optim.adamw(cosine_annealing(0.01, num_warmup_steps=2, num_steps=9, final_scale=0.1), max_norm=1.0)
UPDATES = {"fused": ADAMW, "chain": attrs.evolve(ADAMW, fused_update=None)}


def half(params: Tree) -> Tree:
    return tree.map(Tensor.bfloat16, params)


def constant(params: Tree, batch: Any, key: Tensor | None) -> tuple[Tensor, Any]:
    """A loss whose gradient is 1 everywhere."""
    total = params["w"].sum()
    return total, {"loss": total, "targets": torch.tensor(1)}


def test_updates_far_below_half_a_unit_move_the_parameters_by_their_sum() -> None:
    rate, number, steps = 2.0**-14, 1 << 14, 40  # a unit of what is below 1 is 2**-8
    update = optim.scale_by_learning_rate(lambda step: torch.tensor(rate, dtype=torch.float64))
    params = {"w": torch.ones(number, dtype=torch.bfloat16)}
    assert torch.equal((params["w"].float() - rate).bfloat16(), params["w"]), "rounded to the nearest, they stand still"
    step, state = train_step(constant, update), init_state(params, update, KEY)
    for _ in range(steps):
        state, _ = step(state, torch.zeros(1))
    assert state.params["w"].dtype == torch.bfloat16
    moved = 1 - state.params["w"].double().mean().item()
    deviation = (steps * rate * 2.0**-8 / number) ** 0.5
    assert abs(moved - steps * rate) < 5 * deviation
    assert steps * rate > 20 * deviation


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_an_update_is_that_in_single_precision_within_one_unit(update: optim.Transform) -> None:
    single = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name, shape in (("a", (64, 32)), ("b", (32,)), ("c", ()))
    }
    params = tree.map(lambda p: p.bfloat16().float(), single)
    gradient = optim.mean_gradient(tree.map(lambda p: 0.1 * p.sin(), params), torch.tensor(1))
    arguments = torch.tensor(1), torch.tensor(True), KEY
    expected, state, *_ = optim.guarded_update(update, gradient, update.init(params), params, *arguments)
    found, after, *_ = optim.guarded_update(update, gradient, update.init(half(params)), half(params), *arguments)
    for path, leaf in tree.paths((found, after)).items():
        value = tree.paths((expected, state))[path]
        if leaf.dtype == torch.int64:
            assert leaf == value == 1
        else:
            low, high = neighbours(value * 0.999999), neighbours(value * 1.000001)
            assert leaf.dtype == torch.bfloat16
            assert ((leaf.float() >= torch.minimum(low[0], high[0])) & (leaf.float() <= torch.maximum(low[1], high[1]))).all()
    nothing = torch.tensor(1), torch.tensor(False), KEY
    kept = optim.guarded_update(update, gradient, after, found, *nothing)[:2]
    assert_same_bits(kept, (found, after))
    traced = jit(partial(optim.guarded_update, update))
    assert_same_bits(
        traced(gradient, after, found, *arguments), optim.guarded_update(update, gradient, after, found, *arguments)
    )


CONFIG = attrs.evolve(TINY, num_layers=1)
LOSS = next_token_loss(partial(llama.apply, CONFIG, policy=Policy(torch.bfloat16, logits_at_once=7)))


def batch(number: int) -> Batch:
    return packed([documents(15, seed=2 * number), documents(4, 9, seed=2 * number + 1)], 16)


def test_traced_it_gives_the_same_bits() -> None:
    def trained(wrap: Any) -> State:
        step, state = wrap(train_step(LOSS, ADAMW, 2)), init_state(half(llama.init(CONFIG, KEY)), ADAMW, KEY)
        for number in range(2):
            state, _ = step(state, batch(number))
        assert {leaf.dtype for leaf in tree.leaves((state.params, state.optimizer))} == {torch.bfloat16, torch.int64}
        return state  # type: ignore[no-any-return]

    assert_same_bits(trained(partial(jit, donate=1)), trained(lambda step: step))


def test_sums_of_gradients_are_in_single_precision_and_no_wide_copy_of_a_matrix_outlives_its_update() -> None:
    state = init_state(half(llama.init(CONFIG, KEY)), ADAMW, KEY)
    graph, _ = trace(train_step(LOSS, ADAMW, 2), (state, batch(0)), donate=1)
    inputs = dict(zip(tree.paths(state), graph.graph.find_nodes(op="placeholder"), strict=False))
    casts = torch.ops.aten._to_copy.default
    for path in ("query", "output", "gate", "down"):
        users = inputs[f"params.layers.0.{path}"].users
        assert [user.meta["val"].dtype for user in users if user.target == casts] == [torch.float32], "that of the update"
    kernels = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._fused_adamw_.tensor_lr)
    assert {node.args[1][0].meta["val"].dtype for node in kernels} == {torch.float32}
    assert len(kernels) == len(tree.leaves(state.params))


def test_a_small_model_learns_as_in_single_precision() -> None:
    rate = cosine_annealing(2e-3, num_warmup_steps=5, num_steps=80, final_scale=0.1)
    update, data = optim.adamw(rate, max_norm=1.0), [batch(number) for number in range(3)]

    def losses(params: Tree) -> list[float]:
        step, state, found = jit(train_step(LOSS, update), donate=1), init_state(params, update, KEY), []
        for number in range(80):
            state, metrics = step(state, data[number % 3])
            found.append((metrics["loss"] / metrics["targets"]).item())
        return found

    single, found = losses(llama.init(CONFIG, KEY)), losses(half(llama.init(CONFIG, KEY)))
    assert single[-1] < 0.7 * single[0]
    assert abs(sum(found[-3:]) - sum(single[-3:])) < 0.01 * sum(single[-3:])  # rounded to the nearest, it is 4 % off
