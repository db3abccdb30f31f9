"""A run of a recipe with dropout, frozen parameters and a partition: it goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fnrecipe import optim, random
from fnrecipe.config import resolve
from fnrecipe.errors import EXIT_AGAIN, CheckpointError, UsageError
from fnrecipe.inspect.profile import profile
from fnrecipe.loss import Loss, Sums
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell import train as run
from fnrecipe.tree import Tree
from tests.helpers import bits, pairs, remains


def loss(config: Any) -> Loss:
    inner = lm.loss(config)

    def with_dropout(params: Tree, batch: Any, key: Tensor | None) -> tuple[Tensor, Sums]:
        if key is not None:
            dropped = random.uniform(key, *batch.tokens.shape) < 0.2
            batch = attrs.evolve(batch, tokens=torch.where(dropped, 0, batch.tokens))
        return inner(params, batch, key)

    return with_dropout


def update(config: Any) -> optim.Transform:
    rate = optim.scale_by_learning_rate(cosine_annealing(0.01, num_warmup_steps=2, num_steps=9, final_scale=0.1))
    split = {"*norm": rate, "*": optim.chain(optim.scale_by_adam(), rate)}
    return optim.chain(optim.clip_by_global_norm(1.0), optim.partition(split))


recipe = attrs.evolve(lm, loss=loss, update=update, trains=lambda config, path, parameter: not path.startswith("layers.0."))
SMALL = {"regime__num_steps": 6, "dataset__prefetch": 0}


def configured(texts: Path, **changes: Any) -> Any:
    return resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))[0]


def saved(out: Path, step: int) -> dict[str, Tensor]:
    return safetensors.torch.load_file(out / f"checkpoints/step_{step:08d}/state_0000.safetensors")


@pytest.mark.parametrize("jit", ["off", "trace"])
def test_it_goes_on_to_the_same_bytes_and_freezes_what_it_should(texts: Path, tmp_path: Path, jit: str) -> None:
    config = configured(texts, trainer__jit=jit)
    assert run.train(recipe, config, tmp_path / "whole") == 0

    calls = count(1)

    def stopping(config: Any, place: Any) -> Any:
        source = lm.stream(config, place)

        def stopped(cursor: Any = None) -> Any:
            for entry in source(cursor):
                if next(calls) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield entry

        return stopped

    assert run.train(attrs.evolve(recipe, stream=stopping), config, tmp_path / "cut") == EXIT_AGAIN
    assert run.train(recipe, config, tmp_path / "cut") == 0
    found, expected = remains(tmp_path / "cut"), remains(tmp_path / "whole")
    assert {**found, **expected} == {**expected, **found}

    last, first = saved(tmp_path / "whole", 6), saved(tmp_path / "whole", 4)
    frozen = [name for name in last if name.startswith("params.layers.0.")]
    assert len(frozen) == 9, "they are in the checkpoint"
    for name in last:
        if name.startswith("params."):
            assert (bits(last[name]) == bits(first[name])) is (name in frozen), name
    moments = [name for name in last if name.startswith("optimizer.") and "layers" in name]
    assert moments
    assert not [name for name in moments if "layers.0." in name]


def test_other_frozen_parameters_are_told_when_it_goes_on(texts: Path, tmp_path: Path) -> None:
    config = configured(texts, regime__num_steps=4)
    assert run.train(recipe, config, tmp_path) == 0
    with pytest.raises(CheckpointError, match=r"optimizer\.1\.1\.0\.mean\.layers\.0\.\w+: not in the checkpoint"):
        run.train(attrs.evolve(recipe, trains=lm.trains), configured(texts, regime__num_steps=5), tmp_path)


def test_its_step_is_profiled(texts: Path, tmp_path: Path) -> None:
    found = profile(recipe, configured(texts), tmp_path, steps=1)
    assert found.operations


@pytest.mark.parametrize("jit", ["off", "trace"])
def test_a_draw_in_its_loss_ends_a_run_with_one_line(texts: Path, tmp_path: Path, jit: str) -> None:
    def noisy(config: Any) -> Loss:
        inner = lm.loss(config)
        return lambda params, batch, key: inner(params, attrs.evolve(batch, tokens=torch.randint_like(batch.tokens, 64)), key)

    line = noisy.__code__.co_firstlineno + 2
    recipe: Recipe[Any] = attrs.evolve(lm, loss=noisy)
    with pytest.raises(
        UsageError, match=rf"^{__file__}:{line}: expected random numbers from the loss's key .*, found aten\.rand"
    ):
        run.train(recipe, configured(texts, trainer__jit=jit), tmp_path)
