"""Moments in 8 bits and in bfloat16, against the published rule, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.errors import UsageError
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.optim import Transform
from fnrecipe.optim.dynamic_map import decode, encode, numbers
from fnrecipe.optim.low_precision import Quantized, dequantize, quantize
from fnrecipe.optim.schedule import constant, cosine_annealing
from fnrecipe.parallel.mesh import Axis, Shard
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_same_bits, documents, draw, packed

CPU, KEY, YES = torch.device("cpu"), random.key(0), torch.tensor(True)
signs = pytest.mark.parametrize("signed", [True, False])


def published(signed: bool) -> list[float]:
    """The dynamic map as Dettmers et al. publish it: centres of equal cells between a tenth and one, in each power of ten."""
    found = [0.0, 1.0]
    for power in range(7):
        cells = 2**power * (1 if signed else 2)
        edges = [0.1 + 0.9 * edge / cells for edge in range(cells + 1)]
        centres = [10.0 ** (power - 6) * (low + high) / 2 for low, high in pairwise(edges)]
        found += centres + [-centre for centre in centres if signed]
    return sorted(found)


def magnitudes(signed: bool, number: int = 20_000) -> Tensor:
    """Numbers of all sizes from 1e-9 to 1, ends and zero among them."""
    source = np.random.default_rng(0)
    found = 10.0 ** source.uniform(-9, 0, number) * (source.choice([-1, 1], number) if signed else 1)
    return torch.tensor([0.0, 1.0, -1.0 if signed else 0.5, *found], dtype=torch.float32)


@signs
def test_the_numbers_are_those_of_the_published_map(signed: bool) -> None:
    assert len(published(signed)) == len({*published(signed)}) == 256
    assert numbers(signed, CPU).tolist() == pytest.approx(published(signed), rel=1e-6)
    codes = torch.arange(256).to(torch.uint8)
    assert torch.equal(decode(codes, signed), numbers(signed, CPU))
    assert torch.equal(encode(numbers(signed, CPU), signed), codes)


@signs
def test_a_code_is_that_of_the_nearest_number(signed: bool) -> None:
    values, table = magnitudes(signed).double().numpy(), np.array(published(signed))
    found = np.abs(decode(encode(magnitudes(signed), signed), signed).double().numpy() - values)
    least = np.abs(table[None] - values[:, None]).min(1)
    assert (found <= least * (1 + 1e-4) + 1e-7 * np.abs(values)).all()


def by_blocks(matrix: Tensor, signed: bool, size: int = 256) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scales and numbers of a matrix whose rows are cut into blocks, in float64, by the definition."""
    table = np.array(published(signed))
    scales, rows = [], []
    for row in matrix.double().numpy():
        blocks = [row[first : first + size] for first in range(0, len(row), size)]
        scales.append([np.abs(block).max() for block in blocks])
        near = [
            table[np.abs(block[:, None] / (scale or 1) - table).argmin(1)] * scale
            for block, scale in zip(blocks, scales[-1], strict=True)
        ]
        rows.append(np.concatenate(near))
    return np.array(scales), np.array(rows)


@signs
@pytest.mark.parametrize("shape", [(3, 600), (2, 256), (4, 7), (1, 1)])
def test_each_block_has_its_scale(shape: tuple[int, int], signed: bool) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(shape[0])[:, None]
    matrix[0] *= torch.arange(shape[1]) > 300
    matrix = matrix if signed else matrix.square()
    found = quantize(matrix, signed)
    scales, rows = by_blocks(matrix, signed)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == shape
    assert torch.equal(found.scale.double(), torch.tensor(scales))
    torch.testing.assert_close(dequantize(found), torch.tensor(rows).float(), rtol=1e-6, atol=0)


def cut_along(dim: int, size: int, index: int, whole: Tensor) -> Shard:
    return Shard(whole.chunk(size, dim)[index].contiguous(), dim, Axis("shard", size, index, blocks=4))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_has_the_blocks_of_the_whole(size: int, dim: int) -> None:
    whole = torch.randn(8, 1032, generator=torch.Generator().manual_seed(0))
    expected = quantize(Shard(whole, dim, Axis("shard", blocks=4)), signed=True)
    assert tree.leaves(expected.scale)[0].shape == ((8, 5), (1, 1032))[dim]
    for index in range(size):
        found = quantize(cut_along(dim, size, index, whole), signed=True)
        for mine, all_of_it in zip((found.codes, found.scale), (expected.codes, expected.scale), strict=True):
            assert mine.dim == dim
            assert torch.equal(mine.local, cut_along(dim, size, index, all_of_it.local).local)


def test_a_stack_is_cut_along_its_rows() -> None:
    stack = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))
    each = torch.stack([dequantize(quantize(matrix, True)) for matrix in stack])  # type: ignore[arg-type]
    assert torch.equal(dequantize(quantize(stack, True)), each)  # type: ignore[arg-type]


def test_eight_bit_adamw_is_the_published_rule() -> None:
    """Ten updates in float64, whose moments become those that `by_blocks` has of them."""
    shape, generator = (2, 300), torch.Generator().manual_seed(0)
    begin = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) * 10.0 ** -torch.arange(300).remainder(4) for _ in range(10)]
    adamw = optim.adamw(constant(0.01), betas=(0.9, 0.95), weight_decay=0.1)
    transform = optim.low_precision(adamw, "8bit")
    params, state = {"a": begin}, transform.init({"a": begin})
    for step, gradient in enumerate(gradients, 1):
        updates, state, _ = transform.update({"a": gradient}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    p, m, v = begin.double().numpy(), np.zeros(shape), np.zeros(shape)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.01 * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8) + 0.1 * p)
        m, v = by_blocks(torch.tensor(m), True)[1], by_blocks(torch.tensor(v), False)[1]
    # A number midway between two of the map may go to the other one.
    close = np.abs(params["a"].double().numpy() - p) < 1e-5
    assert close.mean() > 0.99
    assert np.abs(params["a"].double().numpy() - p).max() < 0.01
    whole, _ = plain(adamw, begin, gradients)
    assert (whole - params["a"]).abs().max() > 1e-4  # what is compared is not AdamW itself


def plain(transform: Transform, begin: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tree]:
    params, state = {"a": begin}, transform.init({"a": begin})
    for step, gradient in enumerate(gradients, 1):
        updates, state, _ = transform.update({"a": gradient}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    return params["a"], state


BOTH = optim.split(
    lambda path, parameter: path == "up",
    optim.descent(optim.scale_by_muon(), schedule=constant(0.01)),
    optim.adamw(constant(0.01)),
)
PARAMS = draw({"up": torch.zeros(6, 40), "down": torch.zeros(40, 6), "norm": torch.zeros(40)}, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_matrices_are_narrow_and_nothing_else_is(dtype: torch.dtype) -> None:
    begin = tree.map(lambda leaf: leaf.to(dtype), PARAMS)
    state = tree.paths(optim.low_precision(BOTH, "8bit").init(begin))
    dtypes = {path: leaf.dtype for path, leaf in state.items()}
    assert dtypes.pop("1.0.count") == torch.int64
    scales = {path for path in dtypes if path.endswith(".scale")}
    codes = {path for path, found in dtypes.items() if found == torch.uint8}
    assert codes == {"0.0.0.mean.up.codes", "1.0.mean.down.codes", "1.0.square.down.codes"}
    assert {path.replace("scale", "codes") for path in scales} == codes
    assert {dtypes[path] for path in scales} == {torch.float32}
    assert {path: dtypes[path] for path in dtypes.keys() - codes - scales} == dict.fromkeys(
        ("1.0.mean.norm", "1.0.square.norm"), dtype
    )
    signed = [leaf.signed for leaf in quantized(optim.low_precision(BOTH, "8bit").init(begin))]
    assert signed == [True, True, False]


def quantized(state: Tree) -> list[Quantized]:
    return [leaf for leaf in tree.leaves(state, lambda value: isinstance(value, Quantized)) if isinstance(leaf, Quantized)]


def test_moments_in_bfloat16_are_rounded_stochastically_and_parameters_stay_in_float32() -> None:
    transform = optim.low_precision(BOTH, "bfloat16")
    gradients = optim.mean_gradient(tree.map(torch.sin, PARAMS), torch.tensor(1))
    new, after, _, made = optim.guarded_update(transform, gradients, transform.init(PARAMS), PARAMS, torch.tensor(1), YES, KEY)
    expected, wide, *_ = optim.guarded_update(BOTH, gradients, BOTH.init(PARAMS), PARAMS, torch.tensor(1), YES, KEY)
    assert made
    found, truth = tree.paths(after), tree.paths(wide)
    for path, leaf in found.items():
        if path.endswith(("up", "down")):
            assert leaf.dtype == torch.bfloat16
            assert ((leaf.float() - truth[path]).abs() <= truth[path].abs() * 2.0**-7).all()
            assert not torch.equal(leaf, truth[path].bfloat16())
        else:
            assert_same_bits(leaf, truth[path])
    assert {leaf.dtype for leaf in tree.leaves(new)} == {torch.float32}
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-8)  # of moments that were 0


def test_a_point_that_is_shown_is_that_of_the_state() -> None:
    free = optim.schedule_free_adamw(constant(0.01))
    narrow = optim.low_precision(free, "8bit")
    assert narrow.shown is not None
    found = narrow.shown(narrow.init(PARAMS), PARAMS)
    assert max((a - b).abs().max() for a, b in zip(tree.leaves(found), tree.leaves(PARAMS), strict=True)) < 0.2
    assert optim.low_precision(BOTH, "8bit").shown is None


def test_what_needs_whole_matrices_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a transform that needs elements, found one that needs matrices"):
        optim.low_precision(optim.scale_by_soap(), "8bit")


CONFIG = attrs.evolve(TINY, num_layers=1)
LOSS = next_token_loss(partial(llama.apply, CONFIG))
RATE = cosine_annealing(2e-3, num_warmup_steps=5, num_steps=80, final_scale=0.1)


def losses(update: Transform) -> list[float]:
    data = [packed([documents(15, seed=2 * n), documents(4, 9, seed=2 * n + 1)], 16) for n in range(3)]
    step: Callable[[State, Any], Any] = jit(train_step(LOSS, update), donate=1)
    state, found = init_state(llama.init(CONFIG, KEY), update, KEY), []
    for number in range(80):
        state, metrics = step(state, data[number % 3])
        found.append((metrics["loss"] / metrics["targets"]).item())
    return found


def test_a_small_model_learns_as_with_moments_in_single_precision() -> None:
    adamw = optim.adamw(RATE, max_norm=1.0)
    single, last = losses(adamw), {}
    assert single[-1] < 0.7 * single[0]
    for dtype in ("8bit", "bfloat16"):
        last[dtype] = sum(losses(optim.low_precision(adamw, dtype))[-3:]) / sum(single[-3:])
    assert {dtype: ratio for dtype, ratio in last.items() if not math.isclose(ratio, 1, abs_tol=0.01)} == {}
