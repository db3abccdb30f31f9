"""Dropout and the noise of embeddings by their statistics, and what makes them the same everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fnrecipe import nn, random
from fnrecipe.compiler import inductor
from fnrecipe.transforms import jit
from tests.helpers import compiles, documents, packed

KEY = random.key(1)
NUMBERS = nn.position_numbers(torch.zeros(20, 100))
WIDTH = 50
N = NUMBERS.numel() * WIDTH


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(rate: float) -> None:
    x = torch.full((*NUMBERS.shape, WIDTH), 3.0)
    found = nn.dropout(x, rate, KEY, NUMBERS)
    assert abs((found == 0).float().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / N)
    torch.testing.assert_close(found[found != 0].unique(), torch.tensor([3 / (1 - rate)]), rtol=1e-4, atol=0)
    assert abs(found.mean() - 3) < 4 * 3 * math.sqrt(rate / (1 - rate) / N)


@pytest.mark.parametrize(("rate", "least"), [(1e-6, 1), (1 - 1e-9, 0)])
def test_a_rate_is_rounded_down_to_65536ths(rate: float, least: int) -> None:
    x = torch.ones(*NUMBERS.shape, WIDTH)
    assert nn.dropout(x, rate, KEY, NUMBERS).min() == least
    assert torch.isfinite(nn.dropout(x, rate, KEY, NUMBERS)).all()


def test_neighbours_are_dropped_independently() -> None:
    kept = (nn.dropout(torch.ones(*NUMBERS.shape, WIDTH), 0.5, KEY, NUMBERS) != 0).float()
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.roll(2, 2), kept.roll(WIDTH // 2, 2)):
        assert abs((kept * other).mean() - 0.25) < 4 * math.sqrt(3 / 16 / N)


def test_the_gradient_goes_where_values_go() -> None:
    x = torch.randn(*NUMBERS.shape, WIDTH, generator=torch.Generator().manual_seed(0))
    slope = grad(lambda x: nn.dropout(x, 0.3, KEY, NUMBERS).sum())(x)
    torch.testing.assert_close(slope * x, nn.dropout(x, 0.3, KEY, NUMBERS))


def test_a_position_has_its_noise_whatever_is_beside_it() -> None:
    x, some = torch.ones(*NUMBERS.shape, 7), (slice(2, 9), slice(30, 50))
    assert torch.equal(nn.dropout(x[some], 0.3, KEY, NUMBERS[some]), nn.dropout(x, 0.3, KEY, NUMBERS)[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_of_embeddings_is_uniform_within_the_bound_of_each_document(dtype: torch.dtype) -> None:
    rows, width, alpha = packed([documents(9, 19), documents(2, 3, 5)], 28), 200, 5.0
    lengths = nn.document_sums(torch.ones_like(rows.segments), rows.segments)
    assert [*dict.fromkeys(lengths[0].tolist())] == [9, 19]
    assert [*dict.fromkeys(lengths[1].tolist())] == [2, 3, 5, 18]  # the last are padding
    x = torch.zeros(*rows.tokens.shape, width, dtype=dtype)
    noise = nn.embedding_noise(x, alpha, KEY, nn.position_numbers(rows.tokens), lengths)
    assert noise.dtype == dtype
    scaled = noise.double() / alpha * (lengths * width).double().sqrt()[..., None]
    precision, size = torch.finfo(dtype).eps, scaled.numel()
    assert scaled.abs().max() <= 1 + precision
    assert scaled.abs().amax(-1).min() > 0.9
    assert abs(scaled.mean()) < 4 / math.sqrt(3 * size) + precision
    assert abs(scaled.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / size) + precision


def test_sums_over_documents_are_those_of_each() -> None:
    rows = packed([documents(9, 7, 5), documents(23), []], 24)
    values = torch.randint(0, 5, rows.segments.shape, generator=torch.Generator().manual_seed(0))
    found = nn.document_sums(values, rows.segments)
    for row in range(3):
        for place in range(24):
            assert found[row, place] == values[row][rows.segments[row] == rows.segments[row, place]].sum()


@pytest.mark.slow
@compiles
def test_compiled_it_drops_the_same() -> None:
    def slope(x: Tensor, key: Tensor) -> Tensor:
        found: Tensor = grad(lambda x: nn.dropout(x, 0.3, key, nn.position_numbers(x[..., 0])).square().sum())(x)
        return found

    x = torch.randn(2, 24, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(jit(slope, backend=inductor)(x, KEY), slope(x, KEY))
