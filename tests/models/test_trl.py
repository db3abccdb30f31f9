"""Criteria against TRL 1.16: losses and gradients of its own trainers, on the same weights and answers.

The numbers are what `trl_rows.py` prints. TRL pads a row for each answer; here all lie in one row, and do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import attrs
import numpy as np
import pytest
import torch
from torch.func import grad

from fnrecipe import random, tree
from fnrecipe.build import to_host
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.optim import CRITERIA
from fnrecipe.data.judged import CHOSEN, REJECTED, UNRELATED, Judged, JudgedBatch, collate_judged
from fnrecipe.models import llama
from fnrecipe.models.answers import REFERENCE, preference_loss
from fnrecipe.models.llama.model import model
from fnrecipe.nn.policy import Policy
from fnrecipe.tree import Tree
from tests.models.families import places
from tests.models.trl_rows import CONFIG, EVEN, JUDGED, PARTS, RAGGED, Ids, sines

assert model.hugging_face is not None
TINY = model.hugging_face.read_config(CONFIG)
LIKE = llama.init(TINY, random.key(0))
NAMES = {path: name for path, (_, name) in places(model, TINY, LIKE).items()}
Row = tuple[float, float, float, float, float]

PAIRS: Mapping[str, tuple[str, list[tuple[Ids, Ids, Ids]], Mapping[str, object], Row]] = {
    "dpo": ("dpo", RAGGED, {}, (0.8767984, 46.9703, 0.6728816, 0.1269053, -0.4497372)),
    "dpo of means": (
        "dpo",
        RAGGED,
        {"beta": 2.0, "length_normalization": True},
        (1.895872, 391.8687, 4.367229, 1.295143, -0.419121),
    ),
    "dpo and nll": ("dpo", EVEN, {"beta": 0.3, "nll_scale": 0.2}, (2.433454, 33.58485, -0.4858571, 0.3185658, 0.09531713)),
    "cpo": ("cpo", RAGGED, {"beta": 0.3, "nll_scale": 0.0}, (2.480834, 98.60536, 0.5943719, 1.15055, -0.7115361)),
    "cpo, smoothed": (
        "cpo",
        RAGGED,
        {"beta": 0.3, "nll_scale": 0.0, "label_smoothing": 0.1},
        (2.50614, 78.41354, 0.2301216, 1.100782, -0.4798018),
    ),
    "cpo and nll": ("cpo", EVEN, {"beta": 0.3, "nll_scale": 0.7}, (6.119662, 72.46001, -1.843683, 1.783331, 0.5306908)),
    "simpo": ("simpo", RAGGED, {"beta": 2.0, "gamma": 0.7}, (2.031505, 266.1786, 2.77184, 1.358404, -0.7172364)),
    "simpo and nll": (
        "simpo",
        EVEN,
        {"beta": 2.0, "gamma": 0.7, "nll_scale": 0.5},
        (6.174059, 97.85434, -2.334689, 1.943601, 0.4486311),
    ),
    "orpo, odds alone": (
        "orpo",
        RAGGED,
        {"orpo_lambda": 0.7, "nll_scale": 0.0},
        (0.7480414, 85.66737, 0.8944153, 0.4312396, -0.2249478),
    ),
    "orpo": ("orpo", EVEN, {"orpo_lambda": 0.7}, (7.308717, 72.49622, -2.21819, 1.81623, 1.000059)),
}
SINGLES: Mapping[str, tuple[Mapping[str, object], Row]] = {
    "kto": ({}, (0.4768919, 16.55927, -0.2507065, -0.04186854, 0.263071)),
    "kto, weighted": (
        {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        (0.5717523, 55.18996, -1.046601, 0.1848328, 1.076854),
    ),
}


def params_of(phase: float) -> Tree:
    """The weights of TRL's model, or the direction, as they lie here: Llama's matrices are as transformers has them."""
    tensors = sines({NAMES[path]: leaf.shape for path, leaf in tree.paths(LIKE).items()}, phase)
    return tree.from_paths(LIKE, {path: tensors[name] for path, name in NAMES.items()})


def judged(*answers: tuple[int, Ids, Ids]) -> Judged:
    """Answers of (verdict, prompt, answer)."""
    ids = np.array([token for _, prompt, answer in answers for token in prompt + answer], np.int32)
    trained = np.concatenate([np.arange(len(prompt + answer)) >= len(prompt) for _, prompt, answer in answers])
    sizes = tuple(len(prompt + answer) for _, prompt, answer in answers)
    return Judged(ids, 0, trained=trained, verdicts=tuple(verdict for verdict, _, _ in answers), sizes=sizes)


def found_row(name: str, given: Mapping[str, object], items: Sequence[Judged]) -> list[float]:
    criterion = find_component(name, CRITERIA)
    batch: JudgedBatch = to_host(collate_judged([list(items)], 64, slots=12), torch.device("cpu"))
    loss = preference_loss(
        partial(llama.apply, TINY, policy=Policy(), scope="document"),
        criterion.make(attrs.evolve(criterion.config(), **given)),
        reference="model" if criterion.reference else None,
        pairs=criterion.pairs,
    )
    theirs = params_of(1.0)

    def mean(params: Tree) -> torch.Tensor:
        total, sums = loss({**params, REFERENCE: theirs}, batch, None)
        return total / sums["targets"]

    params, direction = params_of(0.0), tree.paths(params_of(2.0))
    slope = tree.paths(grad(mean)(params))
    products = [sum(float((slope[p] * direction[p]).sum()) for p in slope if part in NAMES[p]) for part in PARTS]
    return [float(mean(params)), math.sqrt(sum(float(leaf.square().sum()) for leaf in slope.values())), *products]


def assert_same_row(found: Sequence[float], row: Row) -> None:
    assert found[:2] == pytest.approx(row[:2], rel=1e-5)
    assert found[2:] == pytest.approx(row[2:], abs=2e-6 * row[1])


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_of_pairs_are_those_of_trl(name: str) -> None:
    criterion, batch, given, row = PAIRS[name]
    items = [judged((CHOSEN, prompt, chosen), (REJECTED, prompt, rejected)) for prompt, chosen, rejected in batch]
    assert_same_row(found_row(criterion, given, items), row)


@pytest.mark.parametrize("name", SINGLES)
def test_losses_and_gradients_of_kto_are_those_of_trl(name: str) -> None:
    given, row = SINGLES[name]
    items = [
        judged(answer)
        for prompt, own, other, desirable in JUDGED
        for answer in ((CHOSEN if desirable else REJECTED, prompt, own), (UNRELATED, prompt, other))
    ]
    assert_same_row(found_row("kto", given, items), row)
