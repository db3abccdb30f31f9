"""The train step: its gradient, its mean, and what it does with a step that is not finite."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import evaluation, jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_close, assert_same_bits, documents, packed

KEY = random.key(5)
AS_IT_IS = optim.stateless(lambda updates, params, step: (updates, {}))
"""The update by which the new parameters are the old ones plus the gradient."""

DATA = {
    "x": torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "y": torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "mask": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool),
}
PARAMS = {"weight": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), "bias": (torch.tensor([0.3], dtype=torch.float64),)}


def squares(params: Tree, batch: Any, key: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    errors = torch.tanh(batch["x"] @ params["weight"] + params["bias"][0]) - batch["y"]
    total = (errors.square() * batch["mask"]).sum()
    return total, {"loss": total, "targets": batch["mask"].sum()}


def step_of(params: Tree, batch: Any, num_microbatches: int, loss: Any = squares) -> tuple[Tree, Any]:
    """The gradient that the step applied, and its metrics."""
    state, metrics = train_step(loss, AS_IT_IS, num_microbatches)(init_state(params, AS_IT_IS, KEY), batch)
    return tree.map(torch.sub, state.params, params), metrics


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_the_gradient_is_that_of_finite_differences_of_the_mean(num_microbatches: int) -> None:
    def mean(params: Tree) -> float:
        total, sums = squares(params, DATA)
        return (total / sums["targets"]).item()

    def difference(path: str, index: int, by: float = 1e-5) -> float:
        def moved(distance: float) -> Tree:
            values = {name: leaf.clone() for name, leaf in tree.paths(PARAMS).items()}
            values[path][index] += distance
            return tree.from_paths(PARAMS, values)

        return (mean(moved(by)) - mean(moved(-by))) / (2 * by)

    gradient, _ = step_of(PARAMS, DATA, num_microbatches)
    for path, leaf in tree.paths(gradient).items():
        assert leaf.tolist() == pytest.approx([difference(path, i) for i in range(len(leaf))], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_leaves_of_unequal_numbers_of_targets_give_the_mean_over_all_targets(num_microbatches: int) -> None:
    params = llama.init(TINY, KEY)
    batch = packed([documents(15), documents(2), documents(1, 3), documents(9), [], documents(4), documents(1), []], 16)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    logits = llama.apply(TINY, leaves, batch.tokens, batch.segments, batch.positions)
    mean = F.cross_entropy(logits[batch.mask], batch.targets[batch.mask])
    mean.backward()
    expected = tree.map(lambda leaf: leaf.grad, leaves)

    gradient, metrics = step_of(params, batch, num_microbatches, next_token_loss(partial(llama.apply, TINY)))
    assert metrics["targets"] == 35
    assert_close(gradient, expected, 1e-4)
    torch.testing.assert_close(metrics["loss"] / metrics["targets"], mean.detach())
    flat = torch.cat([leaf.flatten() for leaf in tree.leaves(expected)])
    torch.testing.assert_close(metrics["grad_norm"], flat.norm())


def test_one_target_is_its_own_mean() -> None:
    one = {**DATA, "mask": torch.arange(8) == 3}
    gradient, metrics = step_of(PARAMS, one, 2)
    assert metrics["targets"] == 1
    assert_close(gradient, torch.func.grad(squares, has_aux=True)(PARAMS, one)[0], 1e-12)


def test_the_mean_of_the_leaves_means_is_something_else() -> None:
    """So the test above can fail."""
    each = [{name: values[i : i + 4] for name, values in DATA.items()} for i in (0, 4)]
    means = [total / sums["targets"] for total, sums in (squares(PARAMS, part) for part in each)]
    total, sums = squares(PARAMS, DATA)
    assert abs((means[0] + means[1]) / 2 - total / sums["targets"]) > 1e-2


def test_a_batch_without_targets_has_no_gradient() -> None:
    gradient, metrics = step_of(PARAMS, {**DATA, "mask": torch.zeros(8, dtype=torch.bool)}, 2)
    assert metrics["targets"] == metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all(not leaf.any() for leaf in tree.leaves(gradient))


def roots(params: Tree, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Finite at 0 with a gradient that is not; below 0 it is the other way round; neither is finite at infinity."""
    total = (params["w"] * batch).abs().sqrt().sum() + torch.where(batch < 0, torch.inf, 0.0).sum()
    return total, {"loss": total, "targets": torch.tensor(batch.numel())}


GOOD, BAD_GRADIENT = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
BAD_LOSS, INFINITE, NAN = torch.tensor([1.0, -1.0]), torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, torch.nan])
SCHEDULE = cosine_annealing(0.1, num_warmup_steps=3, num_steps=10, final_scale=0.1)
ADAMW = optim.adamw(SCHEDULE, max_norm=1.0)


def unchanged(after: State, before: State) -> None:
    assert_same_bits((after.params, after.optimizer), (before.params, before.optimizer))


def start() -> State:
    step = train_step(roots, ADAMW, 2)
    state, _ = step(init_state({"w": torch.tensor([1.0])}, ADAMW, KEY), GOOD)
    return state


@pytest.mark.parametrize("bad", [BAD_GRADIENT, BAD_LOSS, INFINITE, NAN], ids=["gradient", "loss", "infinite", "nan"])
@pytest.mark.parametrize("wrap", [lambda step: step, jit], ids=["eager", "traced"])
def test_a_step_that_is_not_finite_is_skipped(bad: Tensor, wrap: Any) -> None:
    step, before = wrap(train_step(roots, ADAMW, 2)), start()
    state, metrics = step(before, bad)
    unchanged(state, before)
    assert not torch.isfinite(metrics["loss"] + metrics["grad_norm"])
    assert (state.step, state.skipped, metrics["skipped"]) == (2, 1, 1)
    state, metrics = step(state, bad)
    unchanged(state, before)
    assert (state.step, state.skipped, metrics["skipped"]) == (3, 2, 2)
    state, metrics = step(state, GOOD)
    assert (state.step, state.skipped, metrics["skipped"]) == (4, 0, 0)
    assert not torch.equal(state.params["w"], before.params["w"])


def test_a_loss_and_its_gradient_can_each_be_the_one_that_is_not_finite() -> None:
    for batch, finite_loss in [(BAD_GRADIENT, True), (BAD_LOSS, False)]:
        gradient, (total, _) = torch.func.grad_and_value(roots, has_aux=True)({"w": torch.tensor([1.0])}, batch, None)
        assert torch.isfinite(total) == finite_loss
        assert torch.isfinite(gradient["w"]) != finite_loss


def test_a_skipped_step_leaves_no_trace_in_what_follows_but_in_the_schedule() -> None:
    constant = optim.adamw(lambda step: torch.tensor(0.1, dtype=torch.float64))
    step, with_skips = train_step(roots, constant), init_state({"w": torch.tensor([1.0])}, constant, KEY)
    without = with_skips
    for batch in (GOOD, NAN, 2 * GOOD, BAD_LOSS, BAD_GRADIENT, 3 * GOOD):
        with_skips, metrics = step(with_skips, batch)
        if not metrics["skipped"]:
            without, _ = step(without, batch)
    assert (with_skips.step, without.step) == (6, 3)
    unchanged(with_skips, without)


def test_a_skipped_step_moves_the_schedule_and_not_adams_count() -> None:
    step, state = train_step(roots, ADAMW, 1), start()
    state, skipped = step(state, NAN)
    state, metrics = step(state, GOOD)
    rates = [SCHEDULE(torch.tensor(number)) for number in (2, 3)]
    assert [skipped["lr"], metrics["lr"]] == rates
    (adam,) = (part for part in state.optimizer if part)
    assert adam["count"] == 2


def test_metrics_are_numbers_and_the_state_is_not_touched() -> None:
    state = start()
    before = tree.map(torch.clone, state)
    after, metrics = train_step(roots, ADAMW, 2)(state, GOOD)
    assert_same_bits(state, before)
    assert set(metrics) == {"step", "loss", "targets", "grad_norm", "skipped", "lr"}
    assert all(value.shape == () for value in metrics.values())
    assert (metrics["step"], after.step) == (2, 2)
    assert torch.equal(after.key, KEY)


def test_no_two_tensors_of_a_state_share_memory() -> None:
    """What a transform begins with may be the parameters, or one tensor under two names: each is written over by itself."""

    def init(params: Tree) -> Tree:
        mean = tree.map(torch.zeros_like, params)
        return {"start": params, "part": tree.map(lambda leaf: leaf[:1], params), "mean": mean, "again": mean}

    params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    state = init_state(params, attrs.evolve(AS_IT_IS, init=init), KEY)
    leaves = tree.leaves((state.params, state.optimizer))
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves) == 10
    assert state.params["w"] is params["w"]
    assert state.optimizer["start"]["w"].tolist() == [1, 2]
    assert state.optimizer["part"]["w"].tolist() == [1]


def test_a_state_has_these_paths() -> None:
    names = {"params.w", "optimizer.1.mean.w", "optimizer.1.square.w", "optimizer.1.count", "step", "skipped", "key"}
    assert tree.paths(start()).keys() == names


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_evaluation_is_the_sums_of_the_loss(num_microbatches: int) -> None:
    found = evaluation(squares, num_microbatches)(PARAMS, DATA)
    assert_close(found, squares(PARAMS, DATA)[1], 1e-12)
    assert found["targets"] == 5
