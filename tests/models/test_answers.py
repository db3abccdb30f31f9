"""Losses of packed answers are those of a plain loop over answers, one a row, by the formulas of TRL's trainers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from fnrecipe import nn, random, tree
from fnrecipe.build import to_host
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.optim import CRITERIA
from fnrecipe.data.judged import CHOSEN, REJECTED, UNRELATED, Judged, JudgedBatch, collate_judged
from fnrecipe.models import llama
from fnrecipe.models.answers import REFERENCE, Judgement, in_pairs, preference_loss, token_nats
from fnrecipe.models.next_token import Apply
from fnrecipe.nn.policy import Policy
from fnrecipe.shell.recording.means import means
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_close

MODEL, OTHER = (llama.init(attrs.evolve(TINY, init_std=0.3), random.key(seed)) for seed in (0, 1))
PARAMS = {**MODEL, REFERENCE: OTHER}


def apply_by(scope: nn.AttentionScope, chunk: int | None = None) -> Apply:
    return partial(llama.apply, TINY, policy=Policy(logits_at_once=chunk), scope=scope)


def judged(seed: int, *answers: tuple[int, int, int]) -> Judged:
    """Answers of (verdict, tokens of the prompt, tokens of the answer), of random ids."""
    draw = np.random.default_rng(seed)
    parts = [np.arange(before + after) >= before for _, before, after in answers]
    ids = draw.integers(0, 64, sum(map(len, parts))).astype(np.int32)
    sizes = tuple(map(len, parts))
    return Judged(ids, 0, trained=np.concatenate(parts), verdicts=tuple(each[0] for each in answers), sizes=sizes)


def pair(seed: int, prompt: int, chosen: int, rejected: int) -> Judged:
    return judged(seed, (CHOSEN, prompt, chosen), (REJECTED, prompt, rejected))


PAIRS = [[pair(0, 3, 4, 6), pair(1, 2, 1, 3)], [pair(2, 1, 9, 2)], []]
SINGLES = [
    [judged(3, (CHOSEN, 3, 4)), judged(4, (REJECTED, 2, 5)), judged(5, (UNRELATED, 2, 3)), judged(6, (CHOSEN, 1, 2))],
    [judged(7, (REJECTED, 4, 4)), pair(8, 2, 2, 3), judged(9, (UNRELATED, 1, 6))],
]


def batch_of(rows: list[list[Judged]]) -> JudgedBatch:
    found: JudgedBatch = to_host(collate_judged(rows, 40, slots=8), torch.device("cpu"))
    return found


def log_likelihoods(params: Tree, rows: list[list[Judged]]) -> list[tuple[int, Tensor, int]]:
    """Verdict, sum of log-probabilities and number of tokens of each answer, which has a row of its own."""
    found = []
    for item in (item for row in rows for item in row):
        start = 0
        for verdict, size in zip(item.verdicts, item.sizes, strict=True):
            assert item.trained is not None
            ids, mask = torch.tensor(item.ids[None, start : start + size]).long(), item.trained[start : start + size]
            positions = torch.arange(size)[None]
            logits = nn.all_logits(apply_by("row")(params, ids, torch.zeros_like(ids), positions))
            chosen = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append((verdict, chosen[torch.tensor(mask[1:])].sum(), int(mask.sum())))
            start += size
    return found


def in_trl(name: str, config: Any, own: list[tuple[int, Tensor, int]], theirs: list[tuple[int, Tensor, int]]) -> Tensor:
    """The sum of losses as DPOTrainer, CPOTrainer, ORPOTrainer and KTOTrainer of TRL compute each."""
    if name == "kto":
        ratios = [(verdict, mine - other) for (verdict, mine, _), (_, other, _) in zip(own, theirs, strict=True)]
        kl = torch.stack([ratio for verdict, ratio in ratios if verdict == UNRELATED]).mean().clamp(min=0).detach()
        chosen = [1 - torch.sigmoid(config.beta * (ratio - kl)) for verdict, ratio in ratios if verdict == CHOSEN]
        rejected = [1 - torch.sigmoid(config.beta * (kl - ratio)) for verdict, ratio in ratios if verdict == REJECTED]
        return config.desirable_weight * torch.stack(chosen).sum() + config.undesirable_weight * torch.stack(rejected).sum()
    total = torch.zeros(())
    for (_, chosen, tokens), (_, rejected, others), reference in zip(
        own[::2], own[1::2], zip(theirs[::2], theirs[1::2], strict=True), strict=True
    ):
        if name in ("orpo", "simpo"):
            chosen, rejected = chosen / tokens, rejected / others
        match name:
            case "dpo":
                logits = (chosen - rejected) - (reference[0][1] - reference[1][1])
                loss = -F.logsigmoid(config.beta * logits)
                total = total + loss - config.nll_scale * chosen / tokens
            case "cpo":
                total = total - F.logsigmoid(config.beta * (chosen - rejected)) - config.nll_scale * chosen / tokens
            case "simpo":
                total = total - F.logsigmoid(config.beta * (chosen - rejected - config.gamma / config.beta))
            case "orpo":
                odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
                total = total - config.orpo_lambda * F.logsigmoid(odds) - config.nll_scale * chosen
    return total


GIVEN: dict[str, dict[str, float]] = {
    "dpo": {"nll_scale": 0.2},
    "cpo": {"beta": 0.3},
    "orpo": {"orpo_lambda": 0.7},
    "simpo": {"beta": 2.0},
    "kto": {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.7},
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("chunk", [None, 7])
def test_packed_losses_and_gradients_are_those_of_answers_in_rows_of_their_own(name: str, chunk: int | None) -> None:
    criterion = find_component(name, CRITERIA)
    config, rows = attrs.evolve(criterion.config(), **GIVEN[name]), PAIRS if criterion.pairs else SINGLES
    loss = preference_loss(
        apply_by("document", chunk),
        criterion.make(config),
        reference="model" if criterion.reference else None,
        pairs=criterion.pairs,
    )
    batch = batch_of(rows)

    def packed(model: Tree) -> Tensor:
        return loss({**PARAMS, **model}, batch, None)[0]

    def plain(model: Tree) -> Tensor:
        return in_trl(name, config, log_likelihoods(model, rows), log_likelihoods(OTHER, rows))

    found = packed(MODEL)
    assert found.item() == pytest.approx(plain(MODEL).item(), rel=2e-5)
    assert_close(grad(packed)(MODEL), grad(plain)(MODEL), 2e-4)


def test_the_reference_has_no_noise() -> None:
    found, apply, key = [], apply_by("document"), random.key(5)

    def record(params: Tree, *rows: Tensor | None) -> nn.Logits:
        found.append((params, rows[-1]))
        return apply(params, *rows)  # type: ignore[arg-type]

    dpo = find_component("dpo", CRITERIA)
    preference_loss(record, dpo.make(dpo.config()), reference="model", pairs=True)(PARAMS, batch_of(PAIRS), key)
    (model, given), (reference, none) = found
    assert given is key
    assert none is None
    assert model.keys() == MODEL.keys()
    assert reference is OTHER


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_of_several_sources_each_has_its_loss(name: str) -> None:
    """That of a batch in which the others' answers are empty slots."""
    criterion = find_component(name, CRITERIA)
    batch = batch_of(PAIRS)
    second = batch.segments % 4 >= 2 if criterion.pairs else batch.segments % 2 == 1  # every second pair, or answer
    batch = attrs.evolve(batch, sources=second.long())
    judge = in_pairs(lambda chosen, rejected: chosen.sums - 2 * rejected.sums, lambda answers: answers.sums)
    given = judge if criterion.pairs else lambda answers: Judgement(answers.sums, answers.verdicts > 0, answers.sums)
    loss = preference_loss(apply_by("document", None), given, ("a", "b"), reference=None, pairs=criterion.pairs)
    sums = loss(MODEL, batch, None)[1]
    for number, source in enumerate("ab"):
        theirs = attrs.evolve(batch, verdicts=torch.where(_of_slots(batch, number), batch.verdicts, 0))
        alone = loss(MODEL, theirs, None)[1]
        assert 0 < int(sums[f"targets/{source}"]) == int(alone["targets"]) < int(sums["targets"])
        torch.testing.assert_close(sums[f"loss/{source}"], alone["loss"])


def _of_slots(batch: JudgedBatch, number: int) -> Tensor:
    """Whether the answer in each slot is of the source of that number, by a loop over positions."""
    found = torch.zeros_like(batch.verdicts, dtype=torch.bool)
    for row, position in (batch.segments >= 0).nonzero().tolist():  # type: ignore[attr-defined]
        found[row, batch.segments[row, position]] = batch.sources[row, position] == number
    return found


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_rewards_are_counted(name: str) -> None:
    criterion = find_component(name, CRITERIA)
    config, rows = criterion.config(), PAIRS if criterion.pairs else SINGLES
    loss = preference_loss(
        apply_by("document"), criterion.make(config), reference="model" if criterion.reference else None, pairs=criterion.pairs
    )
    sums = {key: float(value) for key, value in loss(PARAMS, batch_of(rows), None)[1].items()}
    own, theirs = log_likelihoods(MODEL, rows), log_likelihoods(OTHER, rows)
    rewards = [
        (verdict, float(mine / size if name == "orpo" else 0.1 * (mine - other)))
        for (verdict, mine, size), (_, other, _) in zip(own, theirs, strict=True)
    ]
    chosen, rejected = ([reward for verdict, reward in rewards if verdict == kind] for kind in (CHOSEN, REJECTED))
    expected = {"mean/rewards/chosen": sum(chosen), "mean/rewards/rejected": sum(rejected)}
    expected["tokens"] = sum(size for _, _, size in own)
    if criterion.pairs:
        margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
        expected |= {"targets": 3, "mean/rewards/margins": sum(margins)}
        expected["mean/rewards/accuracies"] = sum(margin > 0 for margin in margins)
    else:
        expected |= {"targets": 6, "targets/rewards/chosen": 3, "targets/rewards/rejected": 3}
    del sums["loss"]
    assert sums == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", GIVEN)
def test_a_batch_of_padding_adds_nothing(name: str) -> None:
    criterion = find_component(name, CRITERIA)
    loss = preference_loss(
        apply_by("document"),
        criterion.make(criterion.config()),
        reference="model" if criterion.reference else None,
        pairs=criterion.pairs,
    )
    empty = batch_of([[], []])
    assert {float(value) for value in loss(PARAMS, empty, None)[1].values()} == {0.0}
    slope = grad(lambda model: loss({**PARAMS, **model}, empty, None)[0])(MODEL)
    assert all(bool((leaf == 0).all()) for leaf in tree.leaves(slope)), "and no NaN"


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nats_of_deferred_logits_and_their_gradients_are_those_of_whole_ones(softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 8, generator=draw), torch.randn(20, 8, generator=draw)
    targets, scale = torch.randint(0, 20, (2, 9), generator=draw), torch.randn(2, 9, generator=draw)

    def weighted(chunk: int | None) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        return lambda given: (token_nats(nn.logits(*given, chunk, softcap), targets) * scale).sum()

    whole, deferred = (jit(lambda given, c=chunk: (weighted(c)(given), grad(weighted(c))(given))) for chunk in (None, 4))
    assert_close(deferred((x, weight)), whole((x, weight)), 1e-6)


def test_means_are_taken_over_their_own_counts_or_over_the_targets() -> None:
    sums = {"loss": 6.0, "targets": 4, "mean/rewards/chosen": 3.0, "targets/rewards/chosen": 2, "mean/rewards/margins": 1.0}
    shown = means({"step": 7, **sums, "mean/x": 1.0, "targets/x": 0}, "valid")
    assert shown["step"] == 7
    assert shown["valid/loss"] == 1.5
    assert shown["valid/rewards/chosen"] == 1.5
    assert shown["valid/rewards/margins"] == 0.25
    assert math.isnan(shown["valid/x"])
    assert not [name for name in shown if "mean" in name]
