"""Sampling against the model applied to what was said so far."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fnrecipe.models.generate import generate
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.models import llama
from tests.helpers import TINY, draw

PARAMS = tree.map(
    lambda leaf, noise: leaf + 0.3 * noise, llama.init(TINY, random.key(0)), draw(llama.init(TINY, random.key(0)), 1)
)
WINDOW = 8
sample = partial(generate, partial(llama.apply, TINY), PARAMS, window=WINDOW)


def greedy(prompt: list[int], length: int, vocab_size: int) -> list[int]:
    """The likeliest token after the last WINDOW tokens, again and again, without padding or trace."""
    tokens = list(prompt)
    for _ in range(length):
        seen = torch.tensor([tokens[-WINDOW:]])
        logits = llama.apply(TINY, PARAMS, seen, torch.zeros_like(seen), torch.arange(seen.shape[1])[None])
        tokens.append(int(logits[0, -1, :vocab_size].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("vocab_size", [64, 40])
def test_when_cold_it_says_the_likeliest_token_within_its_window(vocab_size: int) -> None:
    found = sample([3, 1, 2], random.key(0), length=14, vocab_size=vocab_size, temperature=1e-4)
    assert found == greedy([3, 1, 2], 14, vocab_size)
    assert max(found) < vocab_size


def test_it_stops_before_the_end_token() -> None:
    whole = greedy([3, 1, 2], 14, 64)
    found = sample([3, 1, 2], random.key(0), length=14, vocab_size=64, temperature=1e-4, eos=whole[5])
    assert found == whole[: whole.index(whole[5])]


def test_a_key_decides_what_is_said() -> None:
    said = [sample([3], random.key(seed), length=10, vocab_size=64, temperature=1.0) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def constant(params: Tensor, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """The same logits everywhere, so that tokens are drawn independently."""
    return params.expand(*tokens.shape, -1)


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    logits, draws = torch.tensor([0.0, 1.0, -2.0, 3.0]), 1000
    found = generate(constant, logits, [0], random.key(0), length=draws, window=1, vocab_size=4, temperature=2.0)
    chances = (logits / 2.0).softmax(-1)
    shares = torch.bincount(torch.tensor(found), minlength=4) / draws
    assert ((shares - chances).abs() < 4 * (chances * (1 - chances) / draws).sqrt()).all()
