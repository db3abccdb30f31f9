"""Laws that every transform keeps, and torch's own optimizers as the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, draw, layout

SCHEDULE = cosine_annealing(0.1, num_warmup_steps=2, num_steps=8, final_scale=0.1)
TRANSFORMS: Mapping[str, Transform] = {
    "clip_by_global_norm": optim.clip_by_global_norm(0.5),
    "scale_by_adam": optim.scale_by_adam(0.8, 0.9, 1e-6),
    "add_decayed_weights": optim.add_decayed_weights(0.1),
    "add_decayed_weights of matrices": optim.add_decayed_weights(0.1, lambda path, parameter: parameter.ndim > 1),
    "scale_by_learning_rate": optim.scale_by_learning_rate(SCHEDULE),
    "stateless": optim.stateless(lambda updates, params, step: (tree.map(torch.neg, updates), {})),
    "masked": optim.masked(optim.scale_by_adam(), lambda path, parameter: parameter.ndim == 1),
    "partition": optim.partition(
        {
            "layers.1.*": optim.stateless(lambda updates, params, step: (tree.map(torch.neg, updates), {})),
            "*": optim.scale_by_adam(),
        }
    ),
    "whole": attrs.evolve(optim.scale_by_adam(), needs="everything"),
    "chain of none": optim.chain(),
    "adamw": optim.adamw(SCHEDULE, max_norm=1.0),
    "adamw without decay and clipping": optim.adamw(SCHEDULE, weight_decay=0.0),
}
over_transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def example(dtype: torch.dtype = torch.float32) -> Tree:
    shapes = {"matrix": (3, 4), "square": (2, 2), "vector": (5,), "scalar": ()}
    named = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return draw({"layers": (named, {"0": named["vector"]}), "head": named["matrix"]}, seed=0)


def updated(transform: Transform, params: Tree, steps: int) -> tuple[Tree, Any, dict[str, Tensor]]:
    """The last updates, state and report after `steps` steps of random gradients."""
    state = transform.init(params)
    for step in range(1, steps + 1):
        gradients = draw(params, seed=step)
        updates, state, report = transform.update(gradients, state, params, torch.tensor(step))
    return updates, state, report


@over_dtypes
@over_transforms
def test_updates_have_the_structure_shapes_and_dtypes_of_the_parameters(transform: Transform, dtype: torch.dtype) -> None:
    params = example(dtype)
    updates, _, _ = updated(transform, params, 2)
    assert layout(updates) == layout(params)
    assert layout(optim.apply_updates(params, updates)) == layout(params)


@over_dtypes
@over_transforms
def test_the_state_keeps_its_structure_shapes_and_dtypes(transform: Transform, dtype: torch.dtype) -> None:
    params = example(dtype)
    _, state, _ = updated(transform, params, 2)
    assert layout(state) == layout(transform.init(params))


@over_transforms
def test_arguments_are_left_as_they_were(transform: Transform) -> None:
    params = example()
    _, state, _ = updated(transform, params, 1)
    arguments = (draw(params, seed=9), state, params, torch.tensor(2))
    before = tree.map(torch.clone, arguments)
    first = transform.update(*arguments)
    assert_same_bits(arguments, before)
    assert_same_bits(transform.update(*arguments), first)


@over_transforms
def test_traced_it_gives_the_same_bits(transform: Transform) -> None:
    params, traced = example(), jit(transform.update)
    _, state, _ = updated(transform, params, 3)
    for step in (4, 5):
        arguments = (draw(params, seed=step), state, params, torch.tensor(step))
        assert_same_bits(traced(*arguments), transform.update(*arguments))


@over_transforms
def test_reports_are_numbers(transform: Transform) -> None:
    _, _, report = updated(transform, example(), 1)
    assert all(value.shape == () for value in report.values())


@pytest.mark.parametrize("first", TRANSFORMS)
@pytest.mark.parametrize("second", TRANSFORMS)
def test_chain_is_one_after_the_other(first: str, second: str) -> None:
    a, b, params, step = TRANSFORMS[first], TRANSFORMS[second], example(), torch.tensor(3)
    state = a.init(params), b.init(params)
    assert_same_bits(optim.chain(a, b).init(params), state)
    chained = optim.chain(a, b).update(draw(params, seed=1), state, params, step)
    between, state_a, report_a = a.update(draw(params, seed=1), state[0], params, step)
    updates, state_b, report_b = b.update(between, state[1], params, step)
    assert_same_bits(chained, (updates, (state_a, state_b), {**report_a, **report_b}))


def torch_adamw(
    params: Tree,
    rate: Callable[[int], float],
    steps: int,
    *,
    decays: optim.Mask,
    weight_decay: float,
    **options: Any,
) -> Tree:
    """`params` after `steps` steps of torch.optim.AdamW on the gradients of `updated`, in two parameter groups."""
    leaves = tree.map(lambda p: torch.nn.Parameter(p.clone()), params)
    groups = [
        {"params": [p for path, p in tree.paths(leaves).items() if decays(path, p)], "weight_decay": weight_decay},
        {"params": [p for path, p in tree.paths(leaves).items() if not decays(path, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], **options)
    for step in range(1, steps + 1):
        for parameter, gradient in zip(tree.leaves(leaves), tree.leaves(draw(params, seed=step)), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return tree.map(torch.Tensor.detach, leaves)


ADAMW = [
    {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"betas": (0.5, 0.999), "eps": 1e-3, "weight_decay": 0.5},
    {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.01},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
]
MASKS = {
    "all": lambda path, parameter: True,
    "matrices": lambda path, parameter: parameter.ndim > 1,
    "a path": lambda path, parameter: path == "layers.0.square",
}


KEY, YES, NO = random.key(1), torch.tensor(True), torch.tensor(False)


def as_chain(transform: Transform) -> Transform:
    return attrs.evolve(transform, fused_update=None)


def mean_of(gradients: Tree) -> optim.MeanGradient:
    """The gradients as an undivided mean; four times a number, and a fourth of that, are exact."""
    return optim.mean_gradient(tree.map(lambda g: 4 * g, gradients), torch.tensor(4))


@pytest.mark.parametrize("decays", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("peak", [1e-3, 0.3])
@pytest.mark.parametrize("options", ADAMW)
@pytest.mark.parametrize(("way", "tolerance"), [(as_chain, 1e-12), (lambda transform: transform, 1e-6)], ids=["chain", "fused"])
def test_adamw_is_torchs(
    way: Callable[[Transform], Transform],
    tolerance: float,
    options: dict[str, Any],
    peak: float,
    decays: optim.Mask,
) -> None:
    """The fused kernel gets its rate and count as float32, so it is exact to that."""
    schedule, params = cosine_annealing(peak, num_warmup_steps=5, num_steps=20, final_scale=0.1), example(torch.float64)
    transform = way(optim.adamw(schedule, mask=decays, **options))
    found, state = params, transform.init(params)
    for step in range(1, 21):
        number = torch.tensor(step)
        found, state, report, _ = optim.guarded_update(
            transform, mean_of(draw(params, seed=step)), state, found, number, YES, KEY
        )
        assert report["lr"] == schedule(number)
    expected = torch_adamw(params, lambda step: schedule(torch.tensor(step)).item(), 20, decays=decays, **options)
    assert_close(found, expected, tolerance)


@over_dtypes
@over_transforms
def test_apply_keeps_structure_and_arguments_and_does_nothing_where_it_must_not(
    transform: Transform, dtype: torch.dtype
) -> None:
    params, gradients, step = example(dtype), draw(example(dtype), seed=1), torch.tensor(1)
    state = transform.init(params)
    given = tree.map(torch.clone, (params, gradients, state))
    new, after, _, made = optim.guarded_update(transform, mean_of(gradients), state, params, step, YES, KEY)
    assert made
    assert layout((new, after)) == layout((params, state))
    assert_same_bits((params, gradients, state), given)
    kept = optim.guarded_update(transform, mean_of(tree.map(lambda g: g * torch.nan, gradients)), state, params, step, NO, KEY)[
        :2
    ]
    assert_same_bits(kept, (params, state))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_fused_adamw_is_the_chain_also_for_gradients_that_are_not_contiguous(max_norm: float | None) -> None:
    params = draw({"a": torch.zeros(5, 7), "b": torch.zeros(7)}, seed=0)
    gradients = {"a": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).T, "b": draw(params, seed=2)["b"]}
    fused = optim.adamw(SCHEDULE, max_norm=max_norm)
    results = []
    for transform in (fused, as_chain(fused)):
        found, state = params, transform.init(params)
        for step in range(1, 6):
            found, state, *_ = optim.guarded_update(transform, mean_of(gradients), state, found, torch.tensor(step), YES, KEY)
        results.append((found, state))
    assert_close(*results, 1e-5)


def test_by_default_matrices_decay_and_vectors_do_not() -> None:
    params = example()
    zeros = tree.map(torch.zeros_like, params)
    transform = optim.adamw(lambda step: torch.tensor(1.0, dtype=torch.float64), weight_decay=0.25)
    updates, _, _ = transform.update(zeros, transform.init(params), params, torch.tensor(1))
    for path, update in tree.paths(updates).items():
        parameter = tree.paths(params)[path]
        assert torch.equal(update, -0.25 * parameter if parameter.ndim > 1 else torch.zeros_like(parameter)), path


@pytest.mark.parametrize("limit", [1e-3, 1.0, 5.9, 100.0])
def test_clipping_is_torchs(limit: float) -> None:
    gradients = example(torch.float64)
    leaves = [torch.nn.Parameter(torch.zeros_like(g)) for g in tree.leaves(gradients)]
    for leaf, gradient in zip(leaves, tree.leaves(gradients), strict=True):
        leaf.grad = gradient.clone()
    before = torch.nn.utils.clip_grad_norm_(leaves, limit)
    clipped, _, _ = optim.clip_by_global_norm(limit).update(gradients, (), gradients, torch.tensor(1))
    for leaf, found in zip(leaves, tree.leaves(clipped), strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=0)
    assert global_norm(clipped) <= limit
    if before < limit:
        assert_same_bits(clipped, gradients)


def test_limits_of_the_clipping_test_lie_on_both_sides_of_the_norm() -> None:
    assert 1.0 < global_norm(example(torch.float64)) < 100.0
