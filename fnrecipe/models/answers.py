"""Log-probabilities of the answers in packed rows, and a loss of what a criterion makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn
from fnrecipe.data.judged import CHOSEN, REJECTED, JudgedBatch
from fnrecipe.loss import Loss, Sums
from fnrecipe.models.adapter import ADAPTER
from fnrecipe.models.next_token import Apply
from fnrecipe.nn.linear_cross_entropy import DeferredLogits
from fnrecipe.parallel import tensor_parallel
from fnrecipe.parallel.mesh import Shard
from fnrecipe.transforms import remat
from fnrecipe.tree import Tree

REFERENCE = "reference"
"""Where among the parameters of the model those of the frozen reference model are."""


@attrs.frozen(eq=False)
class Answers:
    """Answers in slots, [rows, slots], of which some are empty.

    verdicts   int64  what each is, as in `JudgedBatch`
    tokens     int64  its tokens; 0 in an empty slot
    sums       float32  the sum of their log-probabilities
    reference  float32  the same under the reference model; None without one
    """

    verdicts: Tensor
    tokens: Tensor
    sums: Tensor
    reference: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """The mean of the log-probabilities of an answer's tokens; -1 in an empty slot, where 0 would have infinite odds."""
        return torch.where(self.tokens > 0, self.sums / self.tokens.clamp(min=1), -1.0)

    @property
    def ratios(self) -> Tensor:
        """The sums less those of the reference model."""
        assert self.reference is not None
        return self.sums - self.reference

    def sides(self) -> tuple[Answers, Answers]:
        """The chosen and the rejected answers of pairs, [rows, slots / 2] each: the two of a pair are neighbours."""
        return self._every_second(0), self._every_second(1)

    def _every_second(self, first: int) -> Answers:
        reference = None if self.reference is None else self.reference[:, first::2]
        return Answers(self.verdicts[:, first::2], self.tokens[:, first::2], self.sums[:, first::2], reference)


@attrs.frozen(eq=False)
class Judgement:
    """What a criterion makes of answers.

    losses   float32, one for each pair or answer
    counted  bool, where there is one; what stands elsewhere is not looked at
    rewards  float32 [rows, slots], what the model's preference of each answer is measured by
    """

    losses: Tensor
    counted: Tensor
    rewards: Tensor


Judge: TypeAlias = Callable[[Answers], Judgement]
"""What a criterion is, once its config is known."""


def in_pairs(
    losses: Callable[[Answers, Answers], Tensor], rewards: Callable[[Answers], Tensor], nll_scale: float = 0.0
) -> Judge:
    """The judge of pairs by `losses(chosen, rejected)`, plus `nll_scale` times the mean nats of a chosen token."""

    def judge(answers: Answers) -> Judgement:
        chosen, rejected = answers.sides()
        found = losses(chosen, rejected)
        found = found - nll_scale * chosen.means if nll_scale else found
        return Judgement(found, chosen.verdicts == CHOSEN, rewards(answers))

    return judge


def preference_loss(
    apply: Apply, judge: Judge, sources: Sequence[str] = (), *, reference: Literal["model", "data"] | None, pairs: bool
) -> Loss:
    """What `judge` makes of the answers of a `JudgedBatch`: a sum over pairs, or over answers.

    The reference is a model whose parameters are among the others, at `REFERENCE` or else all but those of the adapter, and
    have no gradient; or the scores of the batch are its log-probabilities; or there is none. It has no noise.

    Sums: `loss` float32, `targets` int64 (pairs or answers), `tokens` int64 (those of answers); `mean/rewards/chosen` and
    `…/rejected`. For `pairs` also `mean/rewards/margins`, and `mean/rewards/accuracies`, the pairs whose chosen answer has
    the greater reward; for others the counts `targets/rewards/chosen` and `…/rejected`. With several `sources`, also
    `loss/NAME` and `targets/NAME` of each.
    """
    named = dict(enumerate(sources)) if len(sources) > 1 else {}

    def loss(params: Tree, batch: JudgedBatch, key: Tensor | None = None) -> tuple[Tensor, Sums]:
        model = {name: value for name, value in params.items() if name != REFERENCE}
        sums = answer_sums(apply, model, batch, key)
        theirs = batch.scores if reference == "data" else None
        if reference == "model":
            base = {name: value for name, value in model.items() if name != ADAPTER}
            theirs = answer_sums(apply, params.get(REFERENCE, base), batch).detach()
        answers = Answers(batch.verdicts, _by_slot(batch, batch.mask), sums, theirs)
        found = judge(answers)
        total = torch.where(found.counted, found.losses, 0.0).sum()
        counts = {"loss": total, "targets": found.counted.sum(), "tokens": batch.mask.sum()}
        for number, name in named.items():
            here = _by_slot(batch, batch.mask & (batch.sources == number)) > 0
            mine = found.counted & (here[:, ::2] if pairs else here)
            counts |= {f"loss/{name}": _sum(found.losses, mine), f"targets/{name}": mine.sum()}
        return total, counts | (_of_pairs(found) if pairs else _of_answers(answers, found))

    return loss


def token_nats(logits: nn.Logits, targets: Tensor) -> Tensor:
    """The nats of each target, float32 [B, T], differentiable; those of deferred logits a chunk at a time, twice each."""
    if isinstance(logits, Shard):
        return tensor_parallel.cross_entropy(logits, targets)
    if not isinstance(logits, DeferredLogits):
        return _nats(logits, targets)
    softcap = logits.softcap

    def of_chunk(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        return _nats(nn.all_logits(DeferredLogits(x, weight, len(x), softcap)), chosen)

    chunks = (torch.split(tensor, logits.chunk) for tensor in (logits.x.flatten(0, -2), targets.flatten()))
    parts = [remat(of_chunk)(part, logits.weight, chosen) for part, chosen in zip(*chunks, strict=True)]
    return torch.cat(parts).view(targets.shape)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)


def answer_sums(apply: Apply, params: Tree, batch: JudgedBatch, key: Tensor | None = None) -> Tensor:
    """The sum of the log-probabilities of each answer's tokens, float32 [rows, slots]."""
    logits = apply(params, batch.tokens, batch.segments, batch.positions, key)
    return -_by_slot(batch, token_nats(logits, batch.targets) * batch.mask)


def _by_slot(batch: JudgedBatch, values: Tensor) -> Tensor:
    """The sums of values [B, T] over each slot's positions, [B, slots]: in an order that no device chooses."""
    slots = torch.arange(batch.verdicts.shape[1], device=values.device)
    here = batch.segments[:, None] == slots[None, :, None]
    return torch.where(here, values[:, None], 0).sum(-1)


def _of_pairs(found: Judgement) -> Sums:
    chosen, rejected = found.rewards[:, ::2], found.rewards[:, 1::2]
    values = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": (chosen > rejected).float()}
    return {f"mean/rewards/{name}": _sum(value, found.counted) for name, value in values.items()}


def _of_answers(answers: Answers, found: Judgement) -> Sums:
    sums = Sums()
    for name, verdict in (("chosen", CHOSEN), ("rejected", REJECTED)):
        here = answers.verdicts == verdict
        sums |= {f"mean/rewards/{name}": _sum(found.rewards, here), f"targets/rewards/{name}": here.sum()}
    return sums


def _sum(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum().detach()
