"""What every optimizer keeps, those that are found by name and those that are composed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fnrecipe import checkpoint, optim, random, tree
from fnrecipe.config.find import find_component, known
from fnrecipe.config.sections.optim import OPTIMIZERS
from fnrecipe.optim import Transform
from fnrecipe.optim.partition import matrices
from fnrecipe.optim.schedule import constant
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.gang import Gang
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, draw, layout
from tests.ranks import assembled, computed_once, mesh_of, on_ranks
from tests.transforms.test_gradients import FEW, MODES, chosen, train

RATE, KEY, YES = constant(0.01), random.key(1), torch.tensor(True)


def named(name: str, **values: object) -> Transform:
    component = find_component(name, OPTIMIZERS)
    return component.make(component.config(**values), optim.Schedules(constant), None)


BY_NAME = {name: named(name) for name in known(OPTIMIZERS)}
BY_HAND: Mapping[str, Transform] = {
    "sgd with momentum": named("sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadamw with decay": named("nadamw", weight_decay=0.1),
    "lion, cautious decay": named("lion", weight_decay=0.1, cautious_weight_decay=True),
    "adamw, beta warming up": optim.adamw(RATE, betas=(constant(0.9, num_warmup_steps=3, start_lr=0.5), 0.95)),
    "adamw, cautious decay": named("adamw", cautious_weight_decay=True),
    "adafactor with decay": named("adafactor", weight_decay=0.1),
    "ademamix warming up": named("ademamix", num_alpha_steps=3, num_beta3_steps=5, weight_decay=0.1),
    "muon, polar express": named("muon", coefficients="polar_express", scale="match_rms", nesterov=False),
    "dion2, most rows": named("dion2", fraction=0.6, coefficients="jordan", ef_decay=0.5, adamw_params=("head",)),
    "normuon, spectral": named("normuon", scale="spectral", adamw_params=("head",)),
    "mars with decay": named("mars", weight_decay=0.1, cautious_weight_decay=True),
    "schedule-free with decay": named("schedule_free", weight_decay=0.1, power=2.0),
    "adamw of 8 bits": optim.low_precision(named("adamw"), "8bit"),
    "lion of 8 bits": optim.low_precision(named("lion", weight_decay=0.1), "8bit"),
    "normuon of 8 bits": optim.low_precision(named("normuon"), "8bit"),
    "muonh": optim.chain(
        optim.clip_adaptively(), optim.split(matrices, optim.scale_by_muon(), optim.scale_by_adam()), optim.hyperball(RATE)
    ),
    "cautious": optim.descent(optim.cautious(optim.scale_by_adam()), schedule=RATE, weight_decay=0.1),
    "polar adam": optim.split(
        lambda path, parameter: parameter.ndim == 2,
        optim.descent(optim.scale_by_adam(), optim.orthogonalize(), optim.normalize_rows(), schedule=RATE),
        optim.descent(optim.momentum(0.9, average=True), schedule=RATE),
    ),
}
ALL = {**BY_NAME, **BY_HAND}
over_all = pytest.mark.parametrize("transform", ALL.values(), ids=ALL.keys())
DECAYS = {"adamw": 0.1, "dion2": 0.01, "muon": 0.1, "normuon": 0.1, "soap": 0.01}
"""The decay of those that decay by default."""


def params(dtype: torch.dtype = torch.float32) -> Tree:
    tall, wide, vector = (torch.zeros(shape, dtype=dtype) for shape in ((7, 3), (4, 6), (5,)))
    return draw({"embedding": tall, "layers": {"0": {"key": wide, "up": tall, "norm": vector}}, "head": wide}, seed=0)


def steps(transform: Transform, begin: Tree, gradients: list[Tree], first: int = 1) -> tuple[Tree, Tree]:
    """Parameters and state after an update for each of the gradients."""
    state = transform.init(begin)
    for step, gradient in enumerate(gradients, first):
        updates, state, _ = transform.update(gradient, state, begin, torch.tensor(step))
        begin = optim.apply_updates(begin, updates)
    return begin, state


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parameters_and_state_keep_their_structure_shapes_and_dtypes(transform: Transform, dtype: torch.dtype) -> None:
    begin = params(dtype)
    state = transform.init(begin)
    new, after, report, made = optim.guarded_update(
        transform, optim.mean_gradient(draw(begin, seed=1), torch.tensor(2)), state, begin, torch.tensor(1), YES, KEY
    )
    assert made
    assert layout((new, after)) == layout((begin, state))
    assert all(value.shape == () for value in report.values())
    assert "lr" in report
    assert any(not torch.equal(*pair) for pair in zip(tree.leaves(new), tree.leaves(begin), strict=True))


@pytest.mark.parametrize("name", BY_NAME)
def test_it_keeps_as_many_tensors_like_each_parameter_as_its_component_says(name: str) -> None:
    begin = params()
    state = tree.paths(BY_NAME[name].init(begin))
    like = [
        sum(f".{key}".endswith(f".{path}") and tensor.shape == leaf.shape for key, tensor in state.items())
        for path, leaf in tree.paths(begin).items()
    ]
    assert min(like) == find_component(name, OPTIMIZERS).moments


@over_all
def test_resumed_it_gives_the_same_bits(transform: Transform, tmp_path: Path) -> None:
    """Parameters and state, saved and loaded after each step: all that an update depends on is in them."""
    begin = params()
    gradients = [draw(begin, seed=seed) for seed in (1, 2, 3)]
    expected, moved, state = steps(transform, begin, gradients), begin, transform.init(begin)
    for step, gradient in enumerate(gradients, 1):
        moved, state = resumed(tmp_path, step, (moved, state))
        updates, state, _ = transform.update(gradient, state, moved, torch.tensor(step))
        moved = optim.apply_updates(moved, updates)
    assert_same_bits((moved, state), expected)


def resumed(root: Path, step: int, state: Tree) -> Tree:
    """`state` out of a checkpoint, in the place of other numbers."""
    checkpoint.save(root, step, state, None, {})
    return checkpoint.restore(checkpoint.of_step(root, step), tree.map(torch.empty_like, state))


@over_all
def test_traced_it_gives_the_same_bits(transform: Transform) -> None:
    begin = params()
    moved, state = steps(transform, begin, [draw(begin, seed=seed) for seed in (1, 2)])
    arguments = (draw(begin, seed=3), state, moved, torch.tensor(3))
    before = tree.map(torch.clone, arguments)
    expected = transform.update(*arguments)
    assert_same_bits(jit(transform.update)(*arguments), expected)
    assert_same_bits(arguments, before)


@pytest.mark.parametrize("name", BY_NAME)
def test_without_a_gradient_matrices_decay_and_nothing_else_moves(name: str) -> None:
    begin = params(torch.float64)
    zeros = tree.map(torch.zeros_like, begin)
    updates, state, report = BY_NAME[name].update(zeros, BY_NAME[name].init(begin), begin, torch.tensor(1))
    begun = {"left_basis", "right_basis", "z"}
    kept = [leaf for key, leaf in tree.paths(state).items() if leaf.ndim > 0 and not begun & {*key.split(".")}]
    assert not any(leaf.any() for leaf in kept)
    for path, update in tree.paths(updates).items():
        parameter = tree.paths(begin)[path]
        of_muon = path in ("layers.0.key", "layers.0.up")
        rate = report["lr"] if of_muon else report.get("lr/others", report["lr"])
        decay = DECAYS.get(name, 0.0) if parameter.ndim > 1 else 0.0
        torch.testing.assert_close(update, -rate * decay * parameter, rtol=1e-12, atol=0)


@over_all
def test_what_a_parameter_gets_does_not_depend_on_the_others(transform: Transform) -> None:
    begin = params()
    gradients = [draw(begin, seed=seed) for seed in (1, 2, 3)]
    together, _ = steps(transform, begin, gradients)
    for path, leaf in tree.paths(begin).items():
        alone, _ = steps(transform, {path: leaf}, [{path: tree.paths(gradient)[path]} for gradient in gradients])
        assert torch.equal(alone[path], tree.paths(together)[path]), path


@over_all
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_an_update_that_is_not_finite_is_not_made(transform: Transform, bad: float) -> None:
    """Of a gradient whose square overflows it is made or not, but what is kept is finite."""
    begin = params()
    moved, state = steps(transform, begin, [draw(begin, seed=1)])
    gradient = draw(begin, seed=2)
    gradient["layers"]["0"]["key"][1, 2] = bad
    mean = optim.mean_gradient(gradient, torch.tensor(1))
    new, after, _, made = optim.guarded_update(transform, mean, state, moved, torch.tensor(2), YES, KEY)
    assert all(leaf.isfinite().all() for leaf in tree.leaves((new, after)))
    if not made:
        assert_same_bits((new, after), (moved, state))
    assert bad == 1e38 or not made


@over_all
def test_it_descends(transform: Transform) -> None:
    """Half the squared distance from a target, over sixty updates by its gradient; Lion's rate is the smallest."""
    place, target = params(torch.float64), draw(params(torch.float64), seed=9)
    state, losses = transform.init(place), []
    for step in range(1, 61):
        gradient = tree.map(torch.sub, place, target)
        losses.append(half_square(gradient))
        updates, state, _ = transform.update(gradient, state, place, torch.tensor(step))
        place = optim.apply_updates(place, updates)
    assert losses[-1] < losses[30] < losses[0]
    assert losses[-1] < 0.995 * losses[0]


def half_square(difference: Tree) -> float:
    return sum(leaf.square().sum().item() / 2 for leaf in tree.leaves(difference))


@pytest.mark.parametrize("name", BY_NAME)
def test_clipping_comes_first(name: str) -> None:
    component, begin = find_component(name, OPTIMIZERS), params(torch.float64)
    clipped = component.make(component.config(), optim.Schedules(constant), 0.5)
    gradient = tree.map(lambda leaf: 10 * leaf, draw(begin, seed=1))
    less, _, _ = optim.clip_by_global_norm(0.5).update(gradient, (), begin, torch.tensor(1))
    expected, _ = steps(BY_NAME[name], begin, [less])
    found, _ = steps(clipped, begin, [gradient])
    assert_close(found, expected, 1e-12)


def check_ranks(rank: int, size: int, names: list[str], modes: dict[str, dict[str, object]], traced: bool) -> None:
    for name in names:
        alone, metrics = computed_once(rank, train, mesh_of(0, 1), ALL[name], traced=False, leaves=FEW)
        for options in modes.values():
            state, found = train(mesh_of(rank, size, **options), ALL[name], traced, leaves=FEW)
            assert_same_bits(assembled(size, state), tree.paths(alone))
            assert_same_bits(found, metrics)


@pytest.mark.slow
def test_all_are_the_same_bits_on_two_ranks() -> None:
    on_ranks(2, check_ranks, [*BY_NAME, "cautious", "muonh", "lion of 8 bits", "normuon of 8 bits"], chosen("fsdp"), False)


def check_other_ranks(rank: int, size: int, root: str) -> None:
    """Steps on all ranks go on in one process, and steps of one process on all ranks, out of a checkpoint."""
    names = ("adafactor", "normuon", "dion2", "soap", "cautious", "adamw of 8 bits")
    for name in names:
        meshes = [mesh_of(0, 1), mesh_of(rank, size), mesh_of(rank, size, sharding="fsdp", shard_size=2), mesh_of(0, 1)]
        gangs = [Gang() if mesh.ranks == 1 else Gang(rank, size) for mesh in meshes]
        begin = {path: leaf for path, leaf in params().items() if path != "layers"} | tree.paths(params()["layers"])
        expected, _ = steps(ALL[name], begin, [draw(begin, seed=step) for step in range(1, 5)])
        state = None
        for step, (mesh, gang) in enumerate(zip(meshes, gangs, strict=True), 1):
            cut = partial(cut_by, mesh)
            fresh = (cut(begin), optim.init_parts(ALL[name], cut(begin)))
            state = fresh if state is None else checkpoint.restore(checkpoint.of_step(Path(root, name), step - 1), fresh)
            moved, kept = state
            updates, kept, _ = ALL[name].update(cut(draw(begin, seed=step)), kept, moved, torch.tensor(step))
            state = optim.apply_updates(moved, updates), kept
            if rank == 0 or not gang.alone:
                checkpoint.save(Path(root, name), step, state, None, {}, gang, mesh)
            dist.barrier()
        assert_same_bits(tree.paths(state[0]), tree.paths(expected))


def cut_by(mesh: Mesh, values: Tree) -> Tree:
    return {path: mesh.cut(path, leaf) for path, leaf in values.items()}


@pytest.mark.slow
def test_they_go_on_under_another_sharding_on_another_number_of_ranks(tmp_path: Path) -> None:
    on_ranks(4, check_other_ranks, str(tmp_path))


@pytest.mark.slow
def test_they_are_under_every_sharding() -> None:
    on_ranks(2, check_ranks, ["muon", "adamw of 8 bits"], MODES, False)


@pytest.mark.slow
def test_whole_matrices_are_the_same_bits_on_four_ranks_and_traced() -> None:
    on_ranks(4, check_ranks, ["muon", "dion2", "adamw of 8 bits"], chosen("hybrid fsdp"), True)
