"""How a token is chosen, against transformers' processors of logits and the chances that they leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fnrecipe import random
from fnrecipe.generation.sampling import Sampling, choose, filtered, penalised, uniforms

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
TOKENS = torch.randint(0, 40, (5, 7), generator=torch.Generator().manual_seed(1))
CASES = {
    "top-k": (Sampling(top_k=6), [TopKLogitsWarper(6)]),
    "top-k beyond": (Sampling(top_k=50), []),
    "top-p": (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
    "top-p, tiny": (Sampling(top_p=1e-6), [TopPLogitsWarper(1e-6)]),
    "min-p": (Sampling(min_p=0.05), [MinPLogitsWarper(0.05)]),
    "all": (
        Sampling(temperature=0.8, top_k=9, top_p=0.8, min_p=0.03),
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.03)],
    ),
}


@pytest.mark.parametrize(("sampling", "theirs"), CASES.values(), ids=CASES)
def test_filters_leave_what_those_of_transformers_leave(sampling: Sampling, theirs: list[object]) -> None:
    expected = LOGITS
    for warper in theirs:
        expected = warper(TOKENS, expected)  # type: ignore[operator]
    found = filtered(LOGITS / sampling.temperature, sampling)
    torch.testing.assert_close(found, expected)
    assert (found > -torch.inf).any(-1).all()


def test_what_was_said_is_penalised_as_by_transformers() -> None:
    said = torch.zeros(5, 40, dtype=torch.bool).scatter_(1, TOKENS, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(TOKENS, LOGITS)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(penalised(LOGITS, said, 1.3), expected)
    assert torch.equal(penalised(LOGITS, (), 1.3), LOGITS)


def drawn(logits: Tensor, sampling: Sampling, count: int, seed: int = 0) -> Tensor:
    """Tokens of so many positions of a row."""
    draws = uniforms(random.key(seed)[None], torch.tensor([3]), count)[0]
    return choose(logits.expand(count, -1), (), draws, sampling)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.7), Sampling(top_k=3), Sampling(top_p=0.8)])
def test_tokens_come_as_often_as_their_chances_say(sampling: Sampling) -> None:
    """Chi-square, of at most 5 degrees of freedom, below what it exceeds once in a million times."""
    logits, count = torch.tensor([0.0, 1.0, -2.0, 2.5, 0.5, -torch.inf]), 20_000
    chances = filtered(logits[None] / sampling.temperature, sampling)[0].double().softmax(-1)
    seen = torch.bincount(drawn(logits, sampling, count), minlength=6)
    assert seen[chances == 0].sum() == 0
    possible = chances > 0
    expected = count * chances[possible]
    assert ((seen[possible] - expected) ** 2 / expected).sum() < 35.9


def test_a_temperature_of_zero_takes_the_likeliest() -> None:
    cold = Sampling(temperature=0, top_k=3)
    assert torch.equal(choose(LOGITS, (), torch.rand(5).double(), cold), LOGITS.argmax(-1))


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_no_token_without_a_chance_is_chosen_at_the_ends(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.1, 0.2, -torch.inf, 0.3, -torch.inf]])
    (token,) = choose(logits, (), torch.tensor([number]).double(), Sampling())
    assert token == (1 if number == 0 else 4)


def test_uniform_numbers_are_those_of_their_key_and_position() -> None:
    keys = torch.stack([random.key(seed) for seed in range(3)])
    table = uniforms(keys, torch.tensor([0, 5, 2]), 1000)
    assert torch.equal(uniforms(keys[1:2], torch.tensor([7]), 10)[0], table[1, 2:12])
    assert ((table >= 0) & (table < 1)).all()
    assert (table.mean(1) - 0.5).abs().max() < 4 * (1 / 12 / 1000) ** 0.5
    assert len(table.flatten().unique()) == 3000
