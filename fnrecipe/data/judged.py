"""Answers with a verdict: the two of a pair stay side by side in a row, whatever becomes of the row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import numpy as np

from fnrecipe.data.batch import Array, Batch, collate
from fnrecipe.data.pack import Row, pack
from fnrecipe.data.tokenizer import Tokens

CHOSEN, REJECTED, UNRELATED = 1, 2, 3
"""Verdicts: the better answer or a desirable one; the worse or an undesirable one; an answer to another prompt."""
VERDICTS = {CHOSEN: "chosen", REJECTED: "rejected", UNRELATED: "of another prompt"}
"""What they are called."""


@attrs.frozen(eq=False)
class Judged(Tokens):
    """Answers to a prompt, one behind the other, each behind the prompt's own tokens; `trained` are those of the answers.

    It is packed as a whole. A row has a position more for it than its answers need for each but the first of them.

    verdicts  of each answer
    sizes     tokens of each answer with its prompt, which add up to all
    scores    the log-probability of each answer under a reference model; none where that is not known
    """

    verdicts: tuple[int, ...] = attrs.field(kw_only=True)
    sizes: tuple[int, ...] = attrs.field(kw_only=True)
    scores: tuple[float, ...] = attrs.field(kw_only=True, default=())


@attrs.frozen(eq=False)
class JudgedBatch(Batch):
    """Rows of answers, each of which is a piece of its own.

    verdicts  int64 [rows, slots]  what the piece of that number is, one of `CHOSEN`, `REJECTED`, `UNRELATED`; 0 if there is
                                   none. The rejected answer of a pair follows its chosen one
    scores    float32 [rows, slots]  the log-probability of each under a reference model; 0 where that is not known
    """

    verdicts: Array
    scores: Array


def answers_of(item: Tokens) -> list[Tokens]:
    """The answers of a `Judged`, each with its prompt; the bytes of all are those of the first."""
    assert isinstance(item, Judged)
    assert item.trained is not None
    ends = pairwise(accumulate(item.sizes, initial=0))
    shares = [item.num_bytes, *[0] * (len(item.sizes) - 1)]
    return [
        Tokens(item.ids[start:stop], share, item.source, item.epoch, trained=item.trained[start:stop])
        for (start, stop), share in zip(ends, shares, strict=True)
    ]


def collate_judged(rows: Sequence[Row], length: int, *, slots: int) -> JudgedBatch:
    """A batch of rows of `Judged` that have at most `slots` answers in all."""
    batch = collate([[answer for item in row for answer in answers_of(item)] for row in rows], length)
    verdicts, scores = np.zeros((len(rows), slots), np.int64), np.zeros((len(rows), slots), np.float32)
    for number, row in enumerate(rows):
        start = 0
        for item in row:
            assert isinstance(item, Judged)
            stop = start + len(item.verdicts)
            verdicts[number, start:stop], scores[number, start:stop] = item.verdicts, item.scores or 0
            start = stop
    return JudgedBatch(**attrs.asdict(batch, recurse=False), verdicts=verdicts, scores=scores)


def pack_judged(
    items: Sequence[Tokens], index: int, *, length: int, limit: int | None, key: Sequence[int] | None, unrelated: bool = False
) -> list[Row]:
    """`pack` of pairs and single answers, of at most `limit` answers in a row; with `unrelated`, see `with_unrelated`."""
    given = with_unrelated(items, length) if unrelated else items
    return pack(given, index, length=length, limit=None if limit is None else limit // 2, key=key)


def with_unrelated(items: Sequence[Tokens], length: int) -> list[Tokens]:
    """Each item, and behind it its prompt with the first answer of the next one, the first of all for the last; of several.

    Of such an answer what does not fit into `length` is cut: it is there to be estimated by, not to be trained.
    """
    if len(items) < 2:
        return list(items)
    firsts = [answers_of(item)[0] for item in items]
    others = [*firsts[1:], firsts[0]]
    return [
        each for item, own, other in zip(items, firsts, others, strict=True) for each in (item, _answered(own, other, length))
    ]


def _answered(prompt: Tokens, answer: Tokens, length: int) -> Judged:
    """The prompt of one example with the answer of another."""
    before, after = _prompt_size(prompt), _prompt_size(answer)
    assert answer.trained is not None
    ids = np.concatenate([prompt.ids[:before], answer.ids[after:]])[: length + 1]
    trained = np.concatenate([np.zeros(before, np.bool_), answer.trained[after:]])[: length + 1]
    return Judged(ids, 0, prompt.source, prompt.epoch, trained=trained, verdicts=(UNRELATED,), sizes=(len(ids),))


def _prompt_size(example: Tokens) -> int:
    assert example.trained is not None
    return int(np.argmax(example.trained))
