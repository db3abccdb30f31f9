"""No key is ignored in silence, and none is said to be ignored that is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fnrecipe import optim
from fnrecipe.config import resolve, unstructure
from fnrecipe.config.layers import flatten
from fnrecipe.config.reads import READ_BY_SHELL, recorded
from fnrecipe.inspect.graph import trace_step
from fnrecipe.optim.transform import Transform
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.recipes.preference.train import recipe as preference
from fnrecipe.shell import prepare
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import facts, layout
from fnrecipe.shell.guards.unread import FUNCTIONS, warning, watch
from tests.helpers import pairs
from tests.recipes.regression import recipe as regression
from tests.recipes.regression import validate

KEYS = sorted(flatten(unstructure(lm.config), ""))


def sgd(config: Any) -> Transform:
    rate = optim.cosine_annealing(config.optimizer.config.lr, num_warmup_steps=0, num_steps=9, final_scale=0.1)
    return optim.scale_by_learning_rate(rate)


def late(config: Any) -> Any:
    """A loss of an evaluation, which reads its key when it is called: behind the first step."""
    return lambda params, batch, key: (config.trainer.max_grad_norm, {})


mine = attrs.evolve(lm, name="mine", update=sgd)


def said(recipe: Recipe[Any], paths: set[str], *given: str) -> str:
    config, _ = resolve(recipe.config, (), given)
    return warning(recipe, config, paths)


@pytest.fixture(scope="module")
def read_by_a_step() -> set[str]:
    """What a traced step of the default recipe reads of its config."""
    paths: set[str] = set()
    trace_step(watch(lm, paths), lm.config, torch.device("cpu"))
    return paths


@pytest.mark.parametrize("key", KEYS)
def test_no_key_of_the_default_recipe_is_said_to_be_ignored(
    key: str, read_by_a_step: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its value; what is read behind the first step, or in other processes, is mentioned in code."""
    monkeypatch.setattr("fnrecipe.shell.guards.unread.difference", lambda before, now: {key: (before[key], None)})
    assert warning(lm, lm.config, read_by_a_step) == ""


@pytest.mark.parametrize(
    ("recipe", "given", "ignored"),
    [
        (mine, "trainer.max_grad_norm=0.5", "trainer.max_grad_norm"),
        (attrs.evolve(mine, evaluations=lambda config: {"a": Evaluation(lm.stream, late)}), "trainer.max_grad_norm=0.5", ""),
        (mine, "optimizer.config.weight_decay=0.5", "optimizer.config.weight_decay"),
        (mine, "lr_scheduler.config.final_lr_scale=0.5", "lr_scheduler.config.final_lr_scale"),
        (mine, "optimizer.config.lr=0.5", ""),
        (mine, "regime.sample_prompt=once", ""),
        (attrs.evolve(lm, sample=None), "regime.num_sample_tokens=5", "regime.num_sample_tokens"),
        (attrs.evolve(lm, sample=None), "regime.sample_prompt=once", "regime.sample_prompt"),
        (attrs.evolve(lm, evaluations=lambda config: {}), "regime.validate_every_n_steps=5", "regime.validate_every_n_steps"),
        (regression, "dataset.packing=concat", "dataset.packing"),
        (regression, "dataset.num_workers=2", ""),
        (regression, "common.seed=3", ""),
    ],
)
def test_a_key_that_the_recipe_never_reads_is_told(recipe: Recipe[Any], given: str, ignored: str) -> None:
    expected = f"config: expected keys that the recipe {recipe.name} reads, found {ignored}, which it ignores"
    assert said(recipe, set(), given) == (expected if ignored else "")


def test_what_is_as_in_the_recipe_is_not_told() -> None:
    assert said(mine, set(), f"trainer.max_grad_norm={lm.config.trainer.max_grad_norm}") == ""


def test_keys_that_another_tag_would_have_are_not_told() -> None:
    config, _ = resolve(preference.config, (), ["criterion.name=kto"])
    assert warning(preference, config, {*flatten(unstructure(config), "")}) == ""


def test_all_functions_of_a_recipe_are_watched() -> None:
    functions = {field.name for field in attrs.fields(Recipe) if callable(getattr(lm, field.name))}
    assert set(FUNCTIONS) == functions - {"needs"}


def test_a_run_tells_it_before_its_first_step_is_done(texts: Path, tmp_path: Path) -> None:
    small = pairs(texts, regime__num_steps=4, trainer__jit="off", trainer__max_grad_norm=0.5)
    config, _ = resolve(mine.config, (), small)
    assert run.train(mine, config, tmp_path / "out") == 0
    lines = [line.partition("  ")[2] or line for line in (tmp_path / "out" / layout.log(0)).read_text().splitlines()]
    found = [number for number, line in enumerate(lines) if "which it ignores" in line]
    assert len(found) == 1
    assert "found optimizer" not in lines[found[0]]
    assert "trainer.max_grad_norm" in lines[found[0]]
    assert found[0] < next(number for number, line in enumerate(lines) if "first step after" in line)


def test_the_keys_that_the_shell_reads_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a config that records, which neither the recipe's functions get nor what shows or compares all of it."""
    config, _ = resolve(regression.config, (), ["regime.num_steps=2", "trainer.jit=off"])
    paths: set[str] = set()
    for module, name in (
        *((module, "unstructure") for module in (prepare, run, facts)),
        (prepare, "runtime_paths"),
    ):
        monkeypatch.setattr(module, name, partial(lambda function, _: function(config), getattr(module, name)))
    plain = {name: partial(_with, getattr(regression, name), config) for name in FUNCTIONS if getattr(regression, name)}
    valid = attrs.evolve(regression.evaluations(config)["valid"], stream=partial(_with, validate, config))
    plain["evaluations"] = lambda _: {"valid": valid}
    monkeypatch.setattr(run, "watch", lambda recipe, _: recipe)
    monkeypatch.setattr(run, "warning", lambda *_: "")
    assert run.train(attrs.evolve(regression, **plain), recorded(config, paths), tmp_path / "out") == 0
    table = {f"{section}.{key}" for section, keys in READ_BY_SHELL.items() for key in keys}
    only_then = {key for key in table if key.startswith("common.metric_recorders.wandb.") and not key.endswith(".enabled")}
    only_then |= {"gang.shard_size", "trainer.fp16_loss_scale", "regime.num_sample_tokens"}
    only_then |= {key for key in table if key.startswith("regime.spikes.")}
    assert paths == table - only_then


def _with(function: Callable[..., Any], config: Any, _: Any, *args: Any) -> Any:
    return function(config, *args)
