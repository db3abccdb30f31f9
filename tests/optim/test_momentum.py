"""Momenta that change over steps: loops over numbers in float64, and torch's SGD, are the truth."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from fnrecipe import optim, tree
from fnrecipe.config import resolve
from fnrecipe.config.find import find_component, known
from fnrecipe.config.sections.optim import OPTIMIZERS
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.config import config
from tests.helpers import assert_close, draw
from tests.optim.test_groups import RATES, params, steps, update_of

WARM = {"name": "constant", "config": {"start_lr": 0.5, "num_warmup_steps": 4}}
SOME = [name for name in known(OPTIMIZERS) if find_component(name, OPTIMIZERS).momentum]
FLAT = {"name": "constant"}


def warmed(peak: float, step: int) -> float:
    return 0.5 + (peak - 0.5) * min(step / 4, 1)


def by_hand(update: optim.Transform, numbers: list[float]) -> list[float]:
    """What `update` makes of a gradient that is one number at each step."""
    zero, found = {"a": torch.zeros((), dtype=torch.float64)}, []
    state = update.init(zero)
    for step, number in enumerate(numbers, 1):
        updates, state, report = update.update({"a": torch.tensor(number).double()}, state, zero, torch.tensor(step))
        assert float(report["momentum"]) == pytest.approx(warmed(0.9, step))
        found.append(float(updates["a"]))
    return found


NUMBERS = [1.0, -2.0, 0.5, 3.0, -1.0, 0.25]
MOMENTUM = optim.constant(0.9, num_warmup_steps=4, start_lr=0.5)


def test_the_bias_of_adams_mean_is_by_the_product_of_all_betas() -> None:
    """Each mean is a sum of gradients by weights, whose sum it is divided by."""
    expected, weights, square = [], list[float](), 0.0
    for step, number in enumerate(NUMBERS, 1):
        beta = warmed(0.9, step)
        weights, square = [*(beta * weight for weight in weights), 1 - beta], 0.95 * square + 0.05 * number**2
        mean = sum(map(float.__mul__, weights, NUMBERS)) / sum(weights)
        expected.append(mean / (math.sqrt(square / (1 - 0.95**step)) + 1e-8))
    assert by_hand(optim.scale_by_adam(MOMENTUM, 0.95), NUMBERS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("nesterov", "average"), [(False, False), (True, False), (False, True), (True, True)])
def test_momentum_is_a_loop_over_its_decays(nesterov: bool, average: bool) -> None:
    mean, expected = 0.0, []
    for step, number in enumerate(NUMBERS, 1):
        decay = warmed(0.9, step)
        weight = 1 - decay if average else 1.0
        mean = decay * mean + weight * number
        expected.append(decay * mean + weight * number if nesterov else mean)
    update = optim.momentum(MOMENTUM, nesterov=nesterov, average=average)
    assert by_hand(update, NUMBERS) == pytest.approx(expected, rel=1e-12)


def test_lion_mixes_the_gradient_in_by_the_beta_of_the_step() -> None:
    mean, expected = 0.0, []
    for step, number in enumerate(NUMBERS, 1):
        beta = warmed(0.9, step)
        expected.append(math.copysign(1, beta * mean + (1 - beta) * number))
        mean = 0.99 * mean + 0.01 * number
    assert by_hand(optim.scale_by_lion(MOMENTUM), NUMBERS) == expected


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_torch(nesterov: bool) -> None:
    given = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    update = update_of([], None, name="sgd", config=given, momentum_scheduler=WARM)
    found, _, report = steps(update, params())
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.paths(params()).items()}
    sgd = torch.optim.SGD(leaves.values(), momentum=0.9, nesterov=nesterov)
    for step, rate in enumerate(RATES, 1):
        for path, gradient in tree.paths(draw(params(), seed=step)).items():
            leaves[path].grad = gradient / 2
        sgd.param_groups[0].update(lr=0.1 * rate, momentum=warmed(0.9, step))
        sgd.step()
    assert_close(found, tree.from_paths(params(), {path: leaf.detach() for path, leaf in leaves.items()}), 1e-12)
    assert float(report["momentum"]) == pytest.approx(0.9)


@pytest.mark.parametrize("name", SOME)
def test_a_momentum_that_changes_and_stays_is_one_that_does_not_change(name: str) -> None:
    given = {"momentum": 0.8} if name == "sgd" else {}
    plain, same = (update_of([], name=name, config=given, momentum_scheduler=scheduler) for scheduler in (None, FLAT))
    assert same.fused_update is None
    expected, _, _ = steps(plain, params(), 3)
    found, _, report = steps(same, params(), 3)
    assert_close(found, expected, 1e-6 if plain.fused_update else 1e-12)
    assert "momentum" in report


def test_muons_momentum_warms_up_and_the_beta_of_its_adamw_does_not() -> None:
    warm = update_of([], name="muon", momentum_scheduler=WARM)
    (found, _, report), (plain, _, _) = steps(warm, params(), 2), steps(update_of([], name="muon"), params(), 2)
    assert {name for name in report if "momentum" in name} == {"momentum"}
    assert float(report["momentum"]) == pytest.approx(warmed(0.95, 2))
    same = [path for path, leaf in tree.paths(found).items() if torch.equal(leaf, tree.paths(plain)[path])]
    assert same == [path for path in tree.paths(found) if not path.endswith("query")]


def test_an_update_that_is_not_made_leaves_the_product_of_betas() -> None:
    update = update_of([], momentum_scheduler=WARM)
    begin, state, _ = steps(update, params(), 1)
    mean, never = optim.mean_gradient(params(), torch.tensor(1)), torch.tensor(False)
    _, after, _, _ = optim.guarded_update(update, mean, state, begin, torch.tensor(2), never, torch.zeros(2).long())

    def product(state: object) -> Tensor:
        return next(leaf for path, leaf in tree.paths(state).items() if path.endswith("product"))

    assert float(product(after)) == float(product(state)) == pytest.approx(warmed(0.9, 1))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            "optimizer.name=soap",
            "optimizer.name: expected an optimizer whose momentum may change beside optimizer.momentum_scheduler, "
            "adamw, lion, muon, normuon, sgd, found 'soap'",
        ),
        ("optimizer.groups=[{params: [head], name: mars}]", "optimizer.groups[0].name: expected an optimizer whose momentum"),
        (
            "optimizer.name=sgd",
            "optimizer.momentum_scheduler: expected null where the momentum of optimizer.config is 0, found constant",
        ),
        (
            "optimizer.momentum_scheduler.config.start_lr=1.5",
            "optimizer.momentum_scheduler.config.start_lr: expected a momentum, less than 1, found 1.5",
        ),
        (
            "optimizer.momentum_scheduler={name: exponential, config: {start_lr_scale: 2}}",
            "optimizer.momentum_scheduler.config.start_lr_scale: expected at most 1, or momentum would",
        ),
        (
            "optimizer.momentum_scheduler.config.num_warmup_steps=700",
            "optimizer.momentum_scheduler.config.num_warmup_steps: expected less than regime.num_steps = 600",
        ),
    ],
)
def test_what_cannot_be_is_told(pairs: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(config, [], ["optimizer.momentum_scheduler={name: constant}", pairs])
