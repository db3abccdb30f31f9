"""Transforms of some of the parameters: each sees its own, under their paths, and leaves the others as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe import optim, tree
from fnrecipe.errors import UsageError
from fnrecipe.optim.partition import matrices, merged, subset
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.global_norm import global_norm
from fnrecipe.parallel.mesh import Axis, Mesh, Shard
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits, draw

RATE = cosine_annealing(0.1, num_warmup_steps=1, num_steps=8, final_scale=0.1)
PARAMS = draw(
    {
        "embedding": torch.zeros(6, 4),
        "layers": {str(n): {"norm": torch.zeros(4), "query": torch.zeros(4, 4)} for n in range(2)},
        "head": (torch.zeros(6, 4), torch.zeros(6)),
    },
    seed=0,
)
STEP = torch.tensor(3)
ADAM, SGD = optim.scale_by_adam(), optim.scale_by_learning_rate(RATE)


def run(transform: Transform, params: Tree = PARAMS, steps: int = 3) -> tuple[Tree, Any, optim.Report]:
    state, updates, report = transform.init(params), params, optim.Report()
    for step in range(1, steps + 1):
        updates, state, report = transform.update(draw(params, seed=step), state, params, torch.tensor(step))
    return updates, state, report


def test_each_parameter_is_updated_as_by_its_transform_for_all() -> None:
    split = optim.partition({"layers.*.norm": SGD, "layers.*": ADAM, "*": optim.chain()})
    found, by_sgd, by_adam = tree.paths(run(split)[0]), tree.paths(run(SGD)[0]), tree.paths(run(ADAM)[0])
    gradients = tree.paths(draw(PARAMS, seed=3))
    for path, update in found.items():
        expected = by_sgd if path.endswith("norm") else by_adam if path.startswith("layers") else gradients
        assert torch.equal(update, expected[path]), path


def test_the_states_have_the_paths_of_the_parameters() -> None:
    state = optim.partition({"layers.0.*": ADAM, "layers.*": SGD, "*": ADAM}).init(PARAMS)
    expected = {f"0.{kind}.layers.0.{name}" for kind in ("mean", "square") for name in ("norm", "query")}
    expected |= {f"2.{kind}.{name}" for kind in ("mean", "square") for name in ("embedding", "head.0", "head.1")}
    assert tree.paths(state).keys() == {*expected, "0.count", "2.count"}


def test_a_number_that_several_report_is_told_by_pattern() -> None:
    _, _, report = run(optim.partition({"layers.*": SGD, "head.*": SGD, "*": ADAM}))
    assert report.keys() == {"lr/layers.*", "lr/head.*"}
    _, _, report = run(optim.partition({"layers.*": SGD, "*": ADAM}))
    assert report.keys() == {"lr"}


def test_clipping_in_front_sees_all_gradients_and_clipping_within_its_own() -> None:
    gradients = draw(PARAMS, seed=1)
    clip = optim.clip_by_global_norm(0.5)
    front = optim.chain(clip, optim.partition({"layers.*": optim.chain(), "*": optim.chain()}))
    assert_same_bits(front.update(gradients, front.init(PARAMS), PARAMS, STEP)[0], clip.update(gradients, (), PARAMS, STEP)[0])
    within = optim.partition({"layers.*": clip, "*": optim.chain()})
    clipped, _, _ = within.update(gradients, within.init(PARAMS), PARAMS, STEP)
    torch.testing.assert_close(global_norm(clipped["layers"]), torch.tensor(0.5))
    assert_same_bits(clipped["head"], gradients["head"])


def test_a_masked_transform_leaves_the_others_alone() -> None:
    masked = optim.masked(ADAM, lambda path, parameter: path.startswith("layers") and parameter.ndim == 2)
    updates, state, _ = run(masked)
    expected, gradients = tree.paths(run(ADAM)[0]), tree.paths(draw(PARAMS, seed=3))
    for path, update in tree.paths(updates).items():
        assert torch.equal(update, (expected if path.endswith("query") else gradients)[path]), path
    assert state["mean"].keys() == {"layers.0.query", "layers.1.query"}


def test_masks_see_the_whole_shape_of_a_part() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def note(path: str, parameter: Tensor) -> bool:
        seen[path] = tuple(parameter.shape)
        return True

    mesh = Mesh(shard=Axis("shard", size=4, index=1, blocks=4))
    params = {"w": mesh.cut("w", torch.zeros(32, 8)), "b": mesh.cut("b", torch.zeros(3))}
    assert isinstance(params["w"], Shard)
    optim.masked(ADAM, note).init(params)
    assert seen == {"w": (32, 8), "b": (3,)}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            optim.partition({"layers.*": ADAM, "head": ADAM}),
            "optim.partition: expected a pattern that fits the parameter embedding, found 'layers.*', 'head'",
        ),
        (
            optim.partition({"layer.*": ADAM, "*": ADAM}),
            "optim.partition: expected a parameter that those before it leave for the pattern 'layer.*', "
            "found none in embedding, layers.0.norm, layers.0.query, … (7 in all)",
        ),
        (
            optim.partition({"*": ADAM, "head.*": ADAM}),
            "optim.partition: expected a parameter that those before it leave for the pattern 'head.*', "
            "found none in embedding, layers.0.norm, layers.0.query, … (7 in all)",
        ),
        (optim.partition({}), "optim.partition: expected a pattern that fits the parameter embedding, found none"),
        (
            optim.masked(ADAM, lambda path, parameter: parameter.ndim == 3),
            "optim.masked: expected a parameter for which the mask holds, found none of "
            "embedding, layers.0.norm, layers.0.query, … (7 in all)",
        ),
    ],
)
def test_what_fits_nothing_is_an_error_of_one_line(transform: Transform, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        transform.init(PARAMS)
    assert str(raised.value) == message
    with pytest.raises(UsageError):
        transform.update(PARAMS, ({}, {}), PARAMS, STEP)


def test_a_subset_keeps_paths_and_goes_back_where_it_was() -> None:
    paths = {path for path, leaf in tree.paths(PARAMS).items() if matrices(path, leaf)}
    part = subset(PARAMS, paths)
    assert tree.paths(part).keys() == paths
    assert_same_bits(
        merged(tree.map(torch.zeros_like, PARAMS), part, subset(PARAMS, tree.paths(PARAMS).keys() - paths)), PARAMS
    )
    assert subset(PARAMS, tree.paths(PARAMS)) is PARAMS
