"""A sweep of the rate: it finds what is known of a quadratic, and says what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from attrs import field, frozen
from torch import Tensor

from fnrecipe import optim, presets
from fnrecipe.config import LRSchedulerSection, OptimizerSection, resolve
from fnrecipe.data import LaneAssignment, Source
from fnrecipe.errors import UsageError
from fnrecipe.inspect.lr_find import Sweep, lr_find, write
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.recipe import Recipe
from fnrecipe.transforms import unshard
from fnrecipe.tree import Tree
from tests.recipes import regression

CURVATURES = torch.tensor([0.5, 8.0, 3.0], dtype=torch.float64)
BOUND = 2 / 8.0
"""Gradient descent on the quadratic shrinks each coordinate by |1 - rate * curvature|: above this rate one of them grows."""


@frozen
class Config(regression.Config):
    optimizer: OptimizerSection = field(factory=lambda: OptimizerSection("sgd"))
    lr_scheduler: LRSchedulerSection = field(factory=LRSchedulerSection)


CONFIG, _ = resolve(Config(), pairs=["trainer.jit=off", "gang.num_microbatches=1", "trainer.max_grad_norm=null"])


def init(config: Config, key: Tensor, place: Placement) -> Tree:
    return {"w": place("w", torch.ones(3, dtype=torch.float64, device=key.device))}


def loss(config: Config) -> Loss:
    def of_batch(params: Tree, batch: Mapping[str, Tensor], key: Tensor | None) -> tuple[Tensor, Sums]:
        rows = batch["rows"].sum()
        value = rows * (CURVATURES * unshard(params)["w"] ** 2).sum() / 2
        return value, {"loss": value, "targets": rows}

    return of_batch


def stream(config: Config, assignment: LaneAssignment) -> Source[Any]:
    rows = {"rows": np.ones(config.dataset.batch_size)}
    return lambda cursor: ((rows, index + 1) for index in range(cursor or 0, 160))


def update(config: Config) -> Transform:
    return presets.update(config.optimizer, config.lr_scheduler, config.trainer, config.regime)


def example(config: Config, rows: int) -> Tree:
    return {"rows": np.zeros(rows)}


quadratic = Recipe("quadratic", CONFIG, init, loss, update, stream, example)


def test_the_losses_of_a_quadratic_are_known_and_so_is_its_stability_bound() -> None:
    found = lr_find(quadratic, CONFIG, (1e-3, 10.0), steps=150, window=1)
    factor = (10.0 / 1e-3) ** (1 / 149)
    assert found.diverged
    sizes, expected = np.ones(3), list[float]()
    for rate in found.rates:
        expected.append(float((CURVATURES.numpy() * sizes**2).sum() / 2))
        sizes = sizes * (1 - rate * CURVATURES.numpy())
    assert found.losses == pytest.approx(expected, rel=1e-6)
    assert found.rates == pytest.approx([1e-3 * factor**number for number in range(len(found.rates))])
    alone = attrs.evolve(quadratic, loss=lambda config: _steepest(loss(config)))
    found = lr_find(alone, CONFIG, (1e-3, 10.0), steps=150, window=1)
    assert BOUND <= found.lowest <= BOUND * factor
    assert found.rates[-1] <= BOUND * factor**6


def _steepest(inner: Loss) -> Loss:
    """The loss of the steepest coordinate alone."""

    def of_batch(params: Tree, batch: Any, key: Tensor | None) -> tuple[Tensor, Sums]:
        _, sums = inner(params, batch, key)
        value = sums["targets"] * 4.0 * unshard(params)["w"][1] ** 2
        return value, {**sums, "loss": value}

    return of_batch


def test_means_are_around_a_step_and_the_steepest_is_before_the_lowest() -> None:
    losses = (9.0, 9.0, 8.0, 5.0, 3.0, 2.0, 2.0, 7.0)
    sweep = Sweep(tuple(2.0**number for number in range(8)), losses, 3, diverged=False)
    assert sweep.smoothed == pytest.approx((9, 26 / 3, 22 / 3, 16 / 3, 10 / 3, 7 / 3, 11 / 3, 4.5))
    assert sweep.lowest == 2.0**5
    assert sweep.steepest == 2.0**3
    assert attrs.evolve(sweep, losses=(1.0, 2.0, 3.0), rates=(1.0, 2.0, 4.0)).lowest == 1


def test_the_table_and_the_picture_have_the_numbers(tmp_path: Path) -> None:
    sweep = Sweep((0.1, 0.2, 0.4), (3.0, 1.0, 2.0), 1, diverged=False)
    write(sweep, tmp_path / "new/place")
    assert (tmp_path / "new/place/lr_find.csv").read_text() == "lr,loss,smoothed\n0.1,3.0,3.0\n0.2,1.0,1.0\n0.4,2.0,2.0\n"
    assert "lowest, 0.2" in (tmp_path / "new/place/lr_find.svg").read_text()


def constant(config: Config) -> Transform:
    return optim.sgd(optim.constant(0.1))


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({"update": constant}, [], "quadratic.update: expected a rate as lr_scheduler says it, 0.001, found 0.1"),
        ({}, ["optimizer.config.lr=0"], "optimizer.config.lr: expected a number above 0, found 0"),
    ],
)
def test_a_rate_that_is_not_the_configs_is_told(changes: dict[str, Any], pairs: list[str], message: str) -> None:
    config, _ = resolve(CONFIG, pairs=pairs)
    with pytest.raises(UsageError) as caught:
        lr_find(attrs.evolve(quadratic, **changes), config, (1e-3, 1.0), steps=5)
    assert str(caught.value).startswith(message)


def test_a_recipe_without_a_schedule_in_its_config_is_told() -> None:
    with pytest.raises(
        UsageError, match=r"regression: expected a recipe whose update is that of the sections .* found no optimizer"
    ):
        lr_find(regression.recipe, regression.recipe.config, (1e-3, 1.0), steps=5)


@pytest.mark.parametrize(
    ("rates", "steps", "message"), [((1e3, 1e6), 9, "found divergence at 1000"), ((1e-5, 1e-4), 161, "found 160;")]
)
def test_what_gives_no_sweep_is_told(rates: tuple[float, float], steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lr_find(quadratic, CONFIG, rates, steps=steps)


def test_numbers_that_are_not_finite_end_a_sweep() -> None:
    found = lr_find(quadratic, CONFIG, (1e-3, 1e300), steps=60, window=50)
    assert found.diverged
    assert all(map(math.isfinite, found.losses))
    assert len(found.losses) < 60
