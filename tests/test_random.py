"""Threefry against Random123's known answers, and the statistics of what is made of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fnrecipe import random

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]
N = 100_000


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_known_answers_of_threefry(key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]) -> None:
    words = random.threefry(torch.tensor(key), *map(torch.tensor, counter))
    assert tuple(word.item() for word in words) == expected


def test_threefry_of_many_counters_is_that_of_each() -> None:
    first, second = torch.tensor([0, 0x243F6A88, ONES]), torch.tensor([0, 0x85A308D3, ONES])
    together = random.threefry(random.key(5), first, second)
    for i in range(3):
        alone = random.threefry(random.key(5), first[i], second[i])
        assert [x.item() for x in alone] == [x[i].item() for x in together]


def test_many_words_are_those_of_each_counter() -> None:
    key, half = random.key(5), 2**18 + 5
    found = random.uniform(key, 2 * half)
    for counter in (0, 1, 2**17 - 1, 2**17, 2**18, half - 1):
        words = random.threefry(key, torch.tensor(0), torch.tensor(counter))
        expected = [(word.item() >> 8) / 2**24 for word in words]
        assert [found[counter].item(), found[half + counter].item()] == expected


def test_a_key_is_the_two_words_of_its_seed() -> None:
    assert random.key(0x13198A2E03707344).tolist() == [0x13198A2E, 0x03707344]
    assert len({tuple(random.key(seed).tolist()) for seed in (0, 1, 1 << 32, (1 << 64) - 1)}) == 4


def test_uniform_numbers_are_uniform() -> None:
    found = random.uniform(random.key(0), N)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean() - 1 / 2) < 4 / math.sqrt(12 * N)
    assert abs(found.var() - 1 / 12) < 4 / math.sqrt(180 * N)


def test_the_distance_to_the_uniform_distribution_is_what_chance_makes_it() -> None:
    size, keys = 10_000, 50
    ranks = torch.arange(1, size + 1) / size
    draws = [random.uniform(random.key(seed), size).sort()[0] for seed in range(keys)]
    distances = torch.stack([(draw - ranks).abs().max() * math.sqrt(size) for draw in draws])
    assert abs(distances.mean() - 0.8687) < 4 * 0.2603 / math.sqrt(keys)  # moments of Kolmogorov's distribution


def test_uniform_numbers_are_multiples_of_a_power_of_two() -> None:
    scaled = random.uniform(random.key(0), N).double() * 2**24
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).any()


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    found = random.normal(random.key(1), N, std=2.0).double() / 2
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((found**power).mean() - moment) < 4 * math.sqrt(variance / N), power
    expected = torch.special.ndtr(found.sort()[0])
    assert (expected - torch.arange(1, N + 1) / N).abs().max() < 1.63 / math.sqrt(N)
    half = N // 2
    assert abs(correlation(found[:half], found[half:])) < 4 / math.sqrt(half)
    assert abs(correlation(found[:half] ** 2, found[half:] ** 2)) < 4 / math.sqrt(half)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0,)])
def test_shapes(draw: object, shape: tuple[int, ...]) -> None:
    found = draw(random.key(0), *shape)  # type: ignore[operator]
    assert found.shape == shape
    assert found.unique().numel() == math.prod(shape)


NEIGHBOURS = [
    (0, 1),
    (1, 2),
    (2**32 - 1, 2**32),
    (0, 2**32),
    (-1, 0),
    ("layers.1", "layers.2"),
    ("a", "b"),
    ("", "a"),
    ("1", 1),
]


@pytest.mark.parametrize(("one", "other"), NEIGHBOURS)
def test_keys_of_neighbours_are_independent(one: int | str, other: int | str) -> None:
    keys = [random.fold_in(random.key(3), data) for data in (one, other)]
    first, second = (random.uniform(key, N) for key in keys)
    assert abs(correlation(first, second)) < 4 / math.sqrt(N)
    assert abs(correlation(first[1:], second[:-1])) < 4 / math.sqrt(N)
    assert (first == second).float().mean() < 1e-4


def test_folding_flips_half_of_the_bits() -> None:
    def bits(data: int) -> list[int]:
        return [word >> i & 1 for word in random.fold_in(random.key(0), data).tolist() for i in range(32)]

    flips = torch.tensor([[a ^ b for a, b in zip(bits(i), bits(i + 1), strict=True)] for i in range(500)]).float()
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(flips.numel())
    assert (flips.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(500)


@pytest.mark.parametrize("number", [0, 1, 12345, 2**32 + 7, 2**62])
def test_folding_in_a_number_and_a_tensor_is_the_same(number: int) -> None:
    key = random.key(9)
    assert torch.equal(random.fold_in(key, number), random.fold_in(key, torch.tensor(number)))


def test_the_order_of_folding_matters_and_the_key_stays() -> None:
    key = random.key(1)
    forth, back = (random.fold_in(random.fold_in(key, a), b) for a, b in (("x", "y"), ("y", "x")))
    assert not torch.equal(forth, back)
    assert torch.equal(key, random.key(1))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    random.normal(random.fold_in(random.key(1), "path"), 10)
    assert torch.equal(torch.get_rng_state(), before)


def two_draws(key: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    folded = random.fold_in(key, step)
    return random.uniform(folded, 3), random.normal(folded, 2, 2)


def test_mapped_over_keys_it_gives_what_each_key_gives() -> None:
    keys, steps = torch.stack([random.key(seed) for seed in range(4)]), torch.arange(4)
    mapped = torch.func.vmap(two_draws)(keys, steps)
    for i in range(4):
        for alone, together in zip(two_draws(keys[i], steps[i]), mapped, strict=True):
            assert torch.equal(alone, together[i])


def test_traced_at_one_key_and_step_it_is_right_at_others() -> None:
    graph = make_fx(two_draws, tracing_mode="fake")(random.key(0), torch.tensor(0))
    for seed in range(3):
        arguments = random.key(seed), torch.tensor(10 + seed)
        for traced, eager in zip(graph(*arguments), two_draws(*arguments), strict=True):
            assert torch.equal(traced, eager)
