"""Log-likelihoods of continuations are those of a plain log-softmax, with all logits at once or by chunks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fnrecipe import nn, random
from fnrecipe.data.choices import Continuation
from fnrecipe.models import llama
from fnrecipe.models.likelihood import likelihoods, rows_of
from fnrecipe.nn.policy import Policy
from fnrecipe.transforms import jit
from tests.helpers import TINY

FOUND = [Continuation([1, 2, 3], [4, 5]), Continuation([9], [8, 7, 6, 5]), Continuation([5, 4], [11])]


@pytest.mark.parametrize("chunk", [None, 5])
def test_likelihoods_are_those_of_a_plain_log_softmax(chunk: int | None) -> None:
    params = llama.init(TINY, random.key(0))
    apply = partial(llama.apply, TINY, policy=Policy(logits_at_once=chunk), scope="row")
    batches = list(rows_of(FOUND, rows=2, length=6))
    found = [jit(likelihoods(apply))(params, rows.tokens, rows.targets, rows.mask) for rows in batches]
    assert [len(values) for values, _ in found] == [2, 2]
    for each, value, greedy in zip(FOUND, torch.cat([v for v, _ in found]), torch.cat([g for _, g in found]), strict=False):
        ids = torch.tensor([[*each.given, *each.ids]])
        positions = torch.arange(ids.shape[1])[None]
        logits = nn.all_logits(llama.apply(TINY, params, ids, torch.zeros_like(ids), positions, scope="row"))
        behind = logits[0, len(each.given) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(value, behind.gather(1, torch.tensor(each.ids)[:, None]).sum())
        assert bool(greedy) == (behind.argmax(-1).tolist() == list(each.ids))


def test_the_likeliest_continuation_is_greedy() -> None:
    params = llama.init(TINY, random.key(0))
    apply = partial(llama.apply, TINY, scope="row")
    ids = torch.tensor([[3]])
    likeliest = int(nn.all_logits(apply(params, ids, torch.zeros_like(ids), ids * 0))[0, -1].argmax())
    (rows,) = rows_of([Continuation([3], [likeliest]), Continuation([3], [(likeliest + 1) % 64])], rows=2, length=1)
    assert likelihoods(apply)(params, rows.tokens, rows.targets, rows.mask)[1].tolist() == [True, False]
