"""Groups of parameters: torch's own optimizers with the same groups are the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import optim, presets, random, tree
from fnrecipe.config import (
    LRSchedulerSection,
    OptimizerSection,
    RegimeSection,
    TrainerSection,
    resolve,
    structure,
    unstructure,
    yaml,
)
from fnrecipe.config.find import known
from fnrecipe.config.patterns import fits
from fnrecipe.config.sections.optim import OPTIMIZERS, OptimizerGroup
from fnrecipe.errors import ConfigError
from fnrecipe.models.needs import model_needs
from fnrecipe.recipes.lm.config import config
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, draw
from tests.ranks import assembled, mesh_of, on_ranks
from tests.transforms.test_gradients import chosen, train

REGIME, NORM = RegimeSection(num_steps=8), 2.0
SCHEDULER = structure({"config": {"num_warmup_steps": 2}}, LRSchedulerSection())
GROUPS = (
    {"params": ["head", "layers.1.*"], "lr_scale": 0.5},
    {"params": ["@norms"], "weight_decay": 0.3},
    {"params": ["@matrices"], "lr_scale": 3.0, "weight_decay": 0.0},
)
OWN = {"params": ["embedding"], "name": "sgd", "config": {"lr": 0.2, "momentum": 0.9}}
KEY, YES = random.key(1), torch.tensor(True)


def section(groups: Sequence[Mapping[str, object]], **values: object) -> OptimizerSection:
    return structure({"config": {"lr": 0.1}, **values, "groups": [*groups]}, OptimizerSection())


def update_of(groups: Sequence[Mapping[str, object]], norm: float | None = NORM, **values: object) -> optim.Transform:
    return presets.update(section(groups, **values), SCHEDULER, TrainerSection(max_grad_norm=norm), REGIME)


def params(dtype: torch.dtype = torch.float64) -> Tree:
    layer = {"query": torch.zeros(4, 6), "ffn_norm": torch.zeros(6), "query_bias": torch.zeros(4)}
    like = {
        "embedding": torch.zeros(5, 6),
        "layers": {"0": layer, "1": layer},
        "norm": torch.zeros(6),
        "head": torch.zeros(5, 6),
    }
    return draw(tree.map(lambda leaf: leaf.to(dtype), like), seed=0)


def steps(update: optim.Transform, begin: Tree, count: int = 6) -> tuple[Tree, Tree, dict[str, Tensor]]:
    """Parameters, state and the last report after updates by the means of two gradients each."""
    state, report = optim.init_parts(update, begin), {}
    for number in range(1, count + 1):
        mean = optim.mean_gradient(draw(begin, seed=number), torch.tensor(2))
        begin, state, report, made = optim.guarded_update(update, mean, state, begin, torch.tensor(number), YES, KEY)
        assert made
    return begin, state, report


def by_torch(groups: Sequence[tuple[Sequence[str], Any]], rates: Sequence[float]) -> Tree:
    """The same by torch, where `groups` are paths and functions that make an optimizer of parameters."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.paths(params()).items()}
    optimizers = [make([leaves[path] for path in paths]) for paths, make in groups]
    peaks = [each["lr"] for optimizer in optimizers for each in optimizer.param_groups]
    for number, rate in enumerate(rates, 1):
        for path, gradient in tree.paths(draw(params(), seed=number)).items():
            leaves[path].grad = gradient / 2
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), NORM)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
    return tree.from_paths(params(), {path: leaf.detach() for path, leaf in leaves.items()})


def adamw(rate: float, decay: float) -> Any:
    return lambda tensors: torch.optim.AdamW(tensors, lr=rate, betas=(0.9, 0.95), weight_decay=decay)


LAYER_1 = [f"layers.1.{name}" for name in ("query", "ffn_norm", "query_bias")]
RATES = [float(presets.schedule(SCHEDULER, REGIME)(1.0)(torch.tensor(step))) for step in range(1, 7)]
TORCH = [
    (["head", "layers.1.query"], adamw(0.05, 0.1)),
    (LAYER_1[1:], adamw(0.05, 0.0)),
    (["layers.0.ffn_norm", "norm"], adamw(0.1, 0.3)),
    (["layers.0.query"], adamw(0.3, 0.0)),
    (["layers.0.query_bias"], adamw(0.1, 0.0)),
]


@pytest.mark.parametrize("fused", [True, False])
def test_groups_are_those_of_torch(fused: bool) -> None:
    update = update_of(GROUPS)
    assert update.fused_update is not None
    found, _, report = steps(update if fused else attrs.evolve(update, fused_update=None), params())
    assert_close(found, by_torch([*TORCH, (["embedding"], adamw(0.1, 0.1))], RATES), 1e-6 if fused else 1e-12)
    last = 0.1 * RATES[-1]
    assert {name: float(rate) for name, rate in report.items()} == pytest.approx(
        {"lr": last, "lr/head,layers.1.*": last / 2, "lr/@norms": last, "lr/@matrices": last * 3}
    )


def test_a_group_may_have_an_optimizer_of_its_own() -> None:
    update = update_of([OWN, *GROUPS])
    assert update.fused_update is None
    found, _, _ = steps(update, params())
    sgd = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    assert_close(found, by_torch([*TORCH, (["embedding"], sgd)], RATES), 1e-12)


def test_a_group_that_changes_nothing_changes_no_bit() -> None:
    begin = params(torch.float32)
    plain, _, _ = steps(update_of([]), begin)
    for fused in (True, False):
        update = update_of([{"params": ["@norms"]}, {"params": ["*"], "weight_decay": None}])
        plain, _, _ = steps(update_of([]) if fused else attrs.evolve(update_of([]), fused_update=None), begin)
        found, _, _ = steps(update if fused else attrs.evolve(update, fused_update=None), begin)
        assert_same_bits(found, plain)


def test_half_precision_keeps_its_dtype_and_takes_the_fused_update_to_the_same_place() -> None:
    begin, update = params(torch.bfloat16), update_of(GROUPS)
    found, state, _ = steps(update, begin)
    assert {leaf.dtype for leaf in tree.leaves((found, state)) if leaf.is_floating_point()} == {torch.bfloat16}
    assert_close(tree.map(Tensor.double, found), steps(update, tree.map(Tensor.double, begin))[0], 0.05)


DECAY = {"name": "linear", "config": {"final_lr_scale": 0.5}}


def test_weight_decay_changes_over_steps_as_in_torch() -> None:
    update = update_of([{"params": ["@norms"], "weight_decay": 0.3}], weight_decay_scheduler=DECAY)
    assert update.fused_update is None
    found, _, report = steps(update, params())
    decays = [1 - 0.5 * (step - 1) / 7 for step in range(1, 9)]
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.paths(params()).items()}
    tensors = {tag: [leaf for path, leaf in leaves.items() if fits(path, leaf.ndim, [tag])] for tag in ("@norms", "@biases")}
    matrices = [leaf for leaf in leaves.values() if leaf.ndim > 1]
    decayed = {0.3: tensors["@norms"], 0.1: matrices, 0.0: tensors["@biases"]}
    groups = [{"params": those, "weight_decay": decay} for decay, those in decayed.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for number, rate in enumerate(RATES, 1):
        for path, gradient in tree.paths(draw(params(), seed=number)).items():
            leaves[path].grad = gradient / 2
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), NORM)
        for group, decay in zip(optimizer.param_groups, decayed, strict=True):
            group.update(lr=0.1 * rate, weight_decay=decay * decays[number - 1])
        optimizer.step()
    assert_close(found, tree.from_paths(params(), {path: leaf.detach() for path, leaf in leaves.items()}), 1e-12)
    assert float(report["weight_decay"]) == pytest.approx(0.1 * decays[5])
    assert float(report["weight_decay/@norms"]) == pytest.approx(0.3 * decays[5])


@pytest.mark.parametrize("name", known(OPTIMIZERS))
def test_a_decay_that_changes_and_stays_is_one_that_does_not_change(name: str) -> None:
    stays = {"name": "constant"}
    config = {"weight_decay": 0.2}
    plain, scheduled = (update_of([], name=name, config=config, weight_decay_scheduler=given) for given in (None, stays))
    found, expected = (steps(attrs.evolve(each, fused_update=None), params(), 3)[0] for each in (scheduled, plain))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("name", [name for name in known(OPTIMIZERS) if name != "adafactor"])
def test_the_factor_of_a_rate_is_one_of_each_update(name: str) -> None:
    """But of Adafactor, whose rate is bound by the number of the step."""
    begin = params()
    plain, scaled = (update_of(groups, None, name=name) for groups in ([], [{"params": ["*"], "lr_scale": 0.25}]))
    expected, _, _ = plain.update(draw(begin, seed=1), plain.init(begin), begin, torch.tensor(1))
    found, _, _ = scaled.update(draw(begin, seed=1), scaled.init(begin), begin, torch.tensor(1))
    assert_close(found, tree.map(lambda leaf: leaf / 4, expected), 1e-12)


@pytest.mark.parametrize("name", known(OPTIMIZERS))
def test_the_decay_of_a_group_is_that_of_all_its_parameters(name: str) -> None:
    begin = params()
    zeros = tree.map(torch.zeros_like, begin)
    update = update_of([{"params": ["@norms", "head"], "weight_decay": 0.3}, {"params": ["*"], "weight_decay": 0.0}], name=name)
    updates, _, report = update.update(zeros, update.init(begin), begin, torch.tensor(1))
    rate = float(report["lr/@norms,head"])
    for path, found in tree.paths(updates).items():
        parameter = tree.paths(begin)[path]
        if fits(path, parameter.ndim, ["@norms", "head"]):
            ratio = (found / parameter).unique()
            torch.testing.assert_close(ratio, torch.full_like(ratio, -0.3 * rate), rtol=1e-9, atol=0)
        else:
            assert not found.any()


def test_tags_name_the_matrices_of_adamw_beside_muon() -> None:
    found, expected = (
        steps(update_of([], name="muon", config=config), params(), 2)[0]
        for config in ({"adamw_params": ["@embedding", "@head"]}, {"adamw_params": ["embedding", "head"]})
    )
    assert_same_bits(found, expected)


def test_a_section_with_groups_is_written_and_read_again(tmp_path: Path) -> None:
    given = attrs.evolve(config, optimizer=section([OWN, *GROUPS], weight_decay_scheduler=DECAY))
    (tmp_path / "config.yaml").write_text(yaml.dump(unstructure(given)))
    assert resolve(config, [tmp_path / "config.yaml"])[0] == given


def test_a_step_that_is_not_finite_leaves_all_groups_as_they_were() -> None:
    for groups in (GROUPS, [OWN, *GROUPS]):
        begin, state, _ = steps(update_of(groups), params(torch.float32), 1)
        gradient = draw(begin, seed=3)
        gradient["layers"]["0"]["query"][1, 1] = torch.inf
        mean, accept = optim.mean_gradient(gradient, torch.tensor(1)), torch.tensor(False)
        new, after, _, made = optim.guarded_update(update_of(groups), mean, state, begin, torch.tensor(2), accept, KEY)
        assert not made
        assert_same_bits((new, after), (begin, state))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"params": ["layer.*.query"]}],
            "optimizer.groups[0].params: expected patterns of parameters that are trained, found 'layer.*.query'; "
            "did you mean layers.*.query?",
        ),
        (
            [{"params": ["layers.*"]}, {"params": ["@biases"]}],
            "optimizer.groups[1].params: expected a parameter that the groups before it leave, found '@biases'",
        ),
        (
            [{"params": ["head"]}, {"params": ["norm", "heads"]}],
            "optimizer.groups[1].params: expected patterns of parameters that are trained, found 'heads'; did you mean head?",
        ),
    ],
)
def test_a_pattern_without_parameters_is_an_error_of_one_line(groups: list[Mapping[str, object]], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        optim.init_parts(update_of(groups), params())
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{}]", "optimizer.groups[0].params: expected a pattern of parameters' paths, or a tag, found none (command line)"),
        (
            "[{params: ['@norm']}]",
            "optimizer.groups[0].params: expected a known tag, found '@norm' (command line); did you mean @norms?",
        ),
        (
            "[{params: [a], name: sgd, lr_scale: 2}]",
            "optimizer.groups[0].lr_scale: expected 1 beside the name sgd, whose config says it, found 2 (command line)",
        ),
        (
            "[{params: [a], name: adam}]",
            "optimizer.groups[0].name: expected adafactor or adamw or ademamix or dion2 or lion or mars or muon or nadamw or "
            "normuon or schedule_free or sgd or soap or path/to/file.py or module:attribute, "
            "found 'adam' (command line); did you mean adamw?",
        ),
        (
            "[{params: [a], name: sgd, config: {betas: [0, 0]}}]",
            "optimizer.groups[0].config.betas: expected a known key, found 'betas' (command line); "
            "valid names: decay_vectors, lr, momentum, nesterov, weight_decay",
        ),
    ],
)
def test_what_cannot_stand_in_a_group_is_told(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(config, pairs=[f"optimizer.groups={value}"])
    assert str(raised.value) == message


def test_a_decay_of_an_optimizer_without_one_is_told() -> None:
    group, without = OptimizerGroup(("norm",), weight_decay=0.1), RegimeSection(num_steps=3)
    problems = OptimizerSection("mine.py", without, weight_decay_scheduler=LRSchedulerSection(), groups=(group,)).conflicts()
    expected = "null for optimizer.name=mine.py, whose config has no weight_decay"
    assert [*map(str, problems)] == [
        f"groups[0].weight_decay: expected {expected}, found 0.1",
        f"weight_decay_scheduler: expected {expected}, found cosine_annealing",
    ]


def test_a_schedule_of_decay_that_cannot_be_is_told() -> None:
    given = "optimizer.weight_decay_scheduler={name: cosine_annealing, config: {num_warmup_steps: 700}}"
    with pytest.raises(ConfigError) as raised:
        resolve(config, pairs=[given])
    where, expected = "optimizer.weight_decay_scheduler.config.num_warmup_steps", "less than regime.num_steps = 600"
    assert str(raised.value) == f"{where}: expected {expected}, or a fraction below 1, found 700 (command line)"


def test_what_groups_need_is_what_the_leanest_optimizer_does() -> None:
    def kept(optimizer: OptimizerSection) -> int:
        needs = model_needs(config.model, optimizer, config.dataset, config.gang, config.trainer, 1)
        return next(need.size for need in needs if need.part == "state")

    assert kept(section([OWN])) == kept(section([], name="sgd")) == kept(section([])) // 2
    assert kept(section([], state_dtype="8bit")) == kept(section([], name="sgd"))
    assert kept(section([], state_dtype="bfloat16")) == kept(section([], name="sgd")) * 3 // 2


def test_groups_have_narrow_moments_too() -> None:
    begin = params(torch.float32)
    state = tree.paths(update_of([OWN, *GROUPS], state_dtype="8bit").init(begin))
    of_matrices = [path for path, leaf in tree.paths(begin).items() if leaf.ndim > 1 and path != "embedding"]
    codes = [path for path, leaf in state.items() if leaf.dtype == torch.uint8]
    assert len(codes) == 2 * len(of_matrices) + 1  # AdamW's two, and the momentum of SGD


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["optimizer.name=soap"], "null for the optimizer soap, which keeps more than moments of single elements"),
        (
            ["optimizer.groups=[{params: ['@head'], name: dion2}]"],
            "null for the optimizer dion2, which keeps more than moments of single elements",
        ),
        (["gang.tensor_parallel_size=2"], "null or bfloat16 for gang.tensor_parallel_size = 2"),
    ],
)
def test_moments_that_cannot_be_narrow_are_told(pairs: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(config, pairs=["optimizer.state_dtype=8bit", *pairs])
    assert f"optimizer.state_dtype: expected {expected}, found '8bit'" in str(raised.value)


def test_narrow_moments_of_narrow_parameters_are_told() -> None:
    with pytest.raises(ConfigError, match=r"expected null or 8bit for model\.dtype=bfloat16, in which moments are too"):
        resolve(config, pairs=["optimizer.state_dtype=bfloat16", "model.dtype=bfloat16"])


FEW = [{"params": ["@norms"], "weight_decay": 0.3, "lr_scale": 2.0}, {"params": ["layers.1.*"], "lr_scale": 0.5}]


def check_ranks(rank: int, size: int) -> None:
    muon = {"params": ["layers.*.query"], "name": "muon", "config": {}}
    for groups, modes in ((FEW, ("zero1", "fsdp")), ([muon, *FEW], ("fsdp",))):
        update = update_of(groups)
        alone, metrics = train(mesh_of(0, 1), update, False)
        for options in chosen(*modes).values():
            state, found = train(mesh_of(rank, size, **options), update, False)
            assert_same_bits(assembled(size, state), tree.paths(alone))
            assert_same_bits(found, metrics)


@pytest.mark.slow
def test_groups_are_the_same_bits_on_two_ranks() -> None:
    on_ranks(2, check_ranks)
