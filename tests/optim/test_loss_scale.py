"""Dynamic loss scaling: torch's scaler as the truth for its factors, and bits that it must not change."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import loss_scale
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_same_bits, documents, packed

KEY, CPU = random.key(3), torch.device("cpu")
ADAMW = optim.adamw(cosine_annealing(0.01, num_warmup_steps=2, num_steps=9, final_scale=0.1), max_norm=0.5)
AS_IT_IS = optim.stateless(lambda updates, params, step: (updates, {}))


def scales_of_torch(initial: float, interval: int, finite: list[bool]) -> list[float]:
    """The scales of torch.amp.GradScaler before each step and after the last."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=interval)
    scaler.scale(weight)  # makes its tensors
    scales = [scaler.get_scale()]
    for good in finite:
        weight.grad = torch.tensor(1.0 if good else torch.inf)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@settings(deadline=None)
@given(
    st.integers(-12, 126).map(lambda power: 2.0**power) | st.floats(1e-3, 1e6),
    st.integers(1, 4),
    st.lists(st.booleans(), max_size=30),
)
@example(2.0**127, 1, [True] * 3)
def test_scales_are_those_of_torchs_scaler(initial: float, interval: int, finite: list[bool]) -> None:
    scaling = LossScaling(initial, minimum=1e-30, interval=interval)
    scale = loss_scale.init_scale(scaling, CPU)
    found = [scale.value.item()]
    for good in finite:
        scale, halved = loss_scale.update_scale(scaling, scale, torch.tensor(good))
        assert halved == (not good)
        found.append(scale.value.item())
    assert found == scales_of_torch(torch.tensor(initial).item(), interval, finite)


def test_a_scale_is_not_halved_below_its_minimum_and_then_it_spares_no_step() -> None:
    scaling = LossScaling(5.0, minimum=1.0)
    scale, found = loss_scale.init_scale(scaling, CPU), []
    for _ in range(4):
        scale, halved = loss_scale.update_scale(scaling, scale, torch.tensor(False))
        found.append((scale.value.item(), halved.item()))
    assert found == [(2.5, True), (1.25, True), (1.25, False), (1.25, False)]
    scale, halved = loss_scale.update_scale(scaling, scale, torch.tensor(True))
    assert (scale.value.item(), scale.good.item(), halved.item()) == (1.25, 1, False)


def batches() -> list[Any]:
    rows = [[documents(15), documents(2), documents(1, 3), []], [documents(4), documents(9, 2), documents(8), documents(7)]]
    return [packed(each, 16) for each in rows]


def trained(scaling: LossScaling | None, update: Any, *, policy: Policy = Policy(), wrap: Any = lambda s: s) -> Any:
    """The state after three steps, and the metrics of all."""
    step = wrap(train_step(next_token_loss(partial(llama.apply, TINY, policy=policy)), update, 2, scaling=scaling))
    state, found = init_state(llama.init(TINY, KEY), update, KEY, scaling), []
    for batch in [*batches(), batches()[0]]:
        state, metrics = step(state, batch)
        found.append(tree.map(torch.clone, metrics))
    return state, found


@pytest.mark.parametrize("power", [-13, 7, 24])
@pytest.mark.parametrize("update", [ADAMW, attrs.evolve(ADAMW, fused_update=None)], ids=["fused", "chain"])
@pytest.mark.parametrize("policy", [Policy(), Policy(logits_at_once=7)], ids=["whole", "chunked"])
def test_a_power_of_two_changes_no_bits(power: int, update: Any, policy: Policy) -> None:
    expected, numbers = trained(None, update, policy=policy)
    found, metrics = trained(LossScaling(2.0**power, 1e-5), update, policy=policy)
    assert_same_bits((found.params, found.optimizer), (expected.params, expected.optimizer))
    assert [row.pop("loss_scale") for row in metrics] == [2.0**power] * 3
    assert_same_bits(metrics, numbers)


def test_another_factor_changes_bits_and_nothing_else() -> None:
    """So the test above can fail."""
    expected, _ = trained(None, ADAMW)
    found, _ = trained(LossScaling(100.0, 1.0), ADAMW)
    same = [torch.equal(a, b) for a, b in zip(tree.leaves(found.params), tree.leaves(expected.params), strict=True)]
    assert not all(same)
    torch.testing.assert_close(found.params["embedding"], expected.params["embedding"], rtol=0, atol=1e-4)


def test_steps_in_half_precision_are_near_those_in_single_precision_and_the_same_traced() -> None:
    policy, scaling = Policy(torch.float16, "selective", logits_at_once=7), LossScaling(128.0, 1e-4)
    _, numbers = trained(None, ADAMW)
    found, metrics = trained(scaling, ADAMW, policy=policy)
    for half, single in zip(metrics, numbers, strict=True):
        torch.testing.assert_close(half["loss"], single["loss"], rtol=1e-3, atol=0)
        torch.testing.assert_close(half["grad_norm"], single["grad_norm"], rtol=1e-2, atol=0)
    assert {leaf.dtype for leaf in tree.leaves(found.params)} == {torch.float32}
    assert_same_bits(trained(scaling, ADAMW, policy=policy, wrap=partial(jit, donate=1)), (found, metrics))


def small(params: Tree, batch: Any, key: Tensor | None, times: float) -> tuple[Tensor, Any]:
    """A loss in float16 whose gradient is `times` * 1e-4 * batch."""
    total = ((params["w"].half() * batch * 1e-4).float() * times).sum()
    return total, {"loss": total, "targets": torch.tensor(1)}


def moved(scaling: LossScaling | None, times: float, number: int = 1) -> tuple[State, Tensor, list[Any]]:
    """The state after `number` steps of gradients as they are, policy far the parameter has moved, and the metrics."""
    params, found = {"w": torch.zeros(())}, []
    step, state = train_step(partial(small, times=times), AS_IT_IS, scaling=scaling), init_state(params, AS_IT_IS, KEY, scaling)
    for _ in range(number):
        state, metrics = step(state, torch.ones(1, dtype=torch.float16))
        found.append({name: value.item() for name, value in metrics.items()})
    return state, state.params["w"], found


def test_what_underflows_without_a_scale_arrives_with_one() -> None:
    assert moved(None, 1e-5)[1] == 0
    torch.testing.assert_close(moved(LossScaling(2.0**16, 1.0), 1e-5)[1], torch.tensor(1e-9), rtol=2e-3, atol=0)


def test_a_scale_that_overflows_is_halved_until_it_does_not_and_no_step_counts_as_skipped() -> None:
    state, w, metrics = moved(LossScaling(2.0**14, 1.0), 2.0**6, number=7)  # 2**16 is too much for float16
    assert [row["loss_scale"] for row in metrics] == [2.0**14, *[2.0**p for p in (13, 12, 11, 10)], 2.0**9, 2.0**9]
    assert [row["skipped"] for row in metrics] == [0] * 7
    assert (state.step, state.loss_scale.good) == (7, 2)
    torch.testing.assert_close(w, torch.tensor(2 * 2.0**6 * 1e-4), rtol=2e-3, atol=0)


def test_at_the_minimum_steps_count_as_skipped() -> None:
    _, w, metrics = moved(LossScaling(2.0**14, 2.0**12), 2.0**6, number=5)
    assert [row["loss_scale"] for row in metrics] == [2.0**14, 2.0**13, *[2.0**12] * 3]
    assert [row["skipped"] for row in metrics] == [0, 0, 1, 2, 3]
    assert w == 0


def test_the_scale_grows_after_so_many_good_steps() -> None:
    _, _, metrics = moved(LossScaling(4.0, 1.0, interval=2), 1e-2, number=5)
    assert [row["loss_scale"] for row in metrics] == [4, 4, 8, 8, 16]


def test_a_state_without_a_scale_has_no_leaf_for_it() -> None:
    params = {"w": torch.zeros(())}
    with_scale, without = (init_state(params, AS_IT_IS, KEY, scaling) for scaling in (LossScaling(1.0, 1.0), None))
    assert tree.paths(with_scale).keys() - tree.paths(without).keys() == {"loss_scale.value", "loss_scale.good"}
