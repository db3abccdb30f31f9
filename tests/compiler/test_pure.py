"""What draws from a global generator, or looks at numbers, is refused when a step is traced, with its file and line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import optim, random
from fnrecipe.compiler import trace
from fnrecipe.compiler.pure import without_draws
from fnrecipe.errors import UsageError
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit, remat
from tests.helpers import assert_same_bits

KEY = random.key(0)
UPDATE = optim.scale_by_learning_rate(lambda step: torch.tensor(0.1, dtype=torch.float64))

DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: x * torch.rand(4),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x * torch.randint(3, (4,)),
    "randperm": lambda x: x[torch.randperm(4)],
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((4,), 0.5)),
    "uniform_": lambda x: x + torch.empty(4).uniform_(),
    "normal_": lambda x: x + torch.empty(4).normal_(),
    "dropout": lambda x: F.dropout(x, 0.5),
    "multinomial": lambda x: x[torch.multinomial(torch.ones(4), 2)],
    "gumbel": lambda x: F.gumbel_softmax(x, dim=0),
    "with a generator": lambda x: x * torch.rand(4, generator=torch.Generator().manual_seed(0)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 2, 2)] * 3, dropout_p=0.5),
    "in a recomputed function": lambda x: remat(lambda y: y * torch.rand(4))(x),
}
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.detach().sum().item(),
    "float": lambda x: x * float(x.detach()[0]),
    "if": lambda x: x if (x > 0).all() else -x,
    "int": lambda x: x[: int(x.detach()[0])],
    "nonzero": lambda x: x[x > 0],
    "unique": lambda x: x * x.unique().sum(),
}


def line(function: Callable[[Tensor], Any]) -> str:
    return f"{__file__}:{function.__code__.co_firstlineno}: "


def step_and_args(function: Callable[[Tensor], Any]) -> tuple[Any, tuple[Any, ...]]:
    def loss(params: Any, batch: Tensor, key: Tensor | None) -> Any:
        total = function(params["w"]).sum() * batch.sum()
        return total, {"loss": total, "targets": torch.tensor(batch.numel())}

    return train_step(loss, UPDATE, 2), (init_state({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, UPDATE, KEY), torch.ones(4))


@pytest.mark.parametrize("function", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_from_a_global_generator_is_refused_traced_and_eagerly(function: Callable[[Tensor], Any]) -> None:
    step, args = step_and_args(function)
    for run in (jit(step, donate=1), without_draws(step)):
        with pytest.raises(UsageError) as raised:
            run(*args)
        message = str(raised.value)
        assert message.startswith(line(function) + "expected random numbers from the loss's key (fnrecipe.random), found aten.")
        assert message.endswith(", which draws from a global generator")
        assert "\n" not in message


@pytest.mark.parametrize("function", LOOKS.values(), ids=LOOKS.keys())
def test_a_look_at_numbers_is_refused_traced_and_allowed_eagerly(function: Callable[[Tensor], Any]) -> None:
    step, args = step_and_args(function)
    with pytest.raises(UsageError) as raised:
        jit(step)(*args)
    message = str(raised.value)
    assert message.startswith(line(function) + "expected operations on tensors (torch.where, say), found ")
    assert "\n" not in message


def test_a_number_may_be_looked_at_where_nothing_is_traced() -> None:
    step, args = step_and_args(lambda x: x * args[1].sum().item())
    state, _ = without_draws(step)(*args)
    assert_same_bits(state, step(*args)[0])


def test_an_evaluation_and_any_other_traced_function_are_looked_at_too() -> None:
    with pytest.raises(UsageError, match=r"found aten\.rand"):
        trace(lambda x: x * torch.rand(2), (torch.ones(2),))


ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "by a key": lambda x: x * random.uniform(KEY, 4),
    "attention without dropout": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 2, 2)] * 3, is_causal=True),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "dropout that is off": lambda x: F.dropout(x, 0.5, training=False),
    "a choice": lambda x: torch.where(x > 2, x, -x),
    "a shape": lambda x: x * x.shape[0] if x.ndim == 1 else x,
}


@pytest.mark.parametrize("function", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_pure_is_left_alone(function: Callable[[Tensor], Any]) -> None:
    step, args = step_and_args(function)
    expected = step(*args)
    assert_same_bits(jit(step)(*args), expected)
    assert_same_bits(without_draws(step)(*args), expected)


def test_only_the_first_eager_step_is_looked_at() -> None:
    calls: list[int] = []

    def sometimes(x: Tensor) -> Tensor:
        calls.append(1)
        return x * torch.rand(4) if len(calls) > 2 else x

    step, args = step_and_args(sometimes)
    run = without_draws(step)
    run(*args)
    run(*args)
