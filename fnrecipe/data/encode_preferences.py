"""Preferences as tokens: the answers of a record behind its prompt each, of which the answers are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fnrecipe.data.blocks import Block
from fnrecipe.data.chat_template import Chat
from fnrecipe.data.document import Document, Read
from fnrecipe.data.encode_examples import Encoding, encode_example
from fnrecipe.data.judged import CHOSEN, REJECTED, Judged, answers_of
from fnrecipe.data.preferences import SCORES, Verdict, parse_preference
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import DataError


def encode_preferences(
    source: Source[Read],
    cursor: Cursor = None,
    *,
    encoding: Encoding,
    pairs: bool,
    scored: bool = False,
    number: int = 0,
    epoch: int = 0,
) -> Stream[Judged | DataError]:
    """The records of a source as answers with verdicts; one that is no preference, or with `pairs` no pair, as a bad record.

    So is one that the template refuses, and if answers shall be `scored`, one whose answers are not.
    """
    for item, cursor in source(cursor):
        yield (item if isinstance(item, DataError) else judged(item, encoding, pairs, scored, number, epoch)), cursor


def read_judged(read: Callable[[Block], Iterator[Read]], block: Block, *, encoding: Encoding, pairs: bool) -> Iterator[Read]:
    """The answers in the documents of `read(block)`, a document of ids each, behind their prompts."""
    for item in read(block):
        found = item if isinstance(item, DataError) else judged(item, encoding, pairs)
        if isinstance(found, DataError):
            yield found
        else:
            yield from (Document(ids=answer.ids) for answer in answers_of(found))


def judged(
    document: Document, encoding: Encoding, pairs: bool, scored: bool = False, number: int = 0, epoch: int = 0
) -> Judged | DataError:
    """The answers of a document, or what is wrong with it."""
    bad = document.bad or DataError
    try:
        verdicts = parse_preference(document.text or "")
        if pairs and len(verdicts) == 1:
            raise DataError("expected a pair of answers, found one with a label, which criterion.name=kto takes")
        scores = tuple(verdict.score for verdict in verdicts if verdict.score is not None)
        if scored and not scores:
            keys = " or ".join(f"{better} and {worse}" for better, worse in SCORES.items())
            raise DataError(f"expected log-probabilities under the reference model, {keys}, found none (reference.precomputed)")
        chats = [_answer(verdict, encoding, bad) for verdict in verdicts]
    except DataError as error:
        return bad(str(error))
    ids, trained = (np.concatenate(parts) for parts in zip(*((chat.ids, chat.trained) for chat in chats), strict=True))
    size = len(ids) - 1
    if size > encoding.length and encoding.too_long == "error":
        expected = f"expected answers with their prompt of at most {encoding.length:,} tokens (dataset.max_seq_len)"
        return bad(f"{expected}, found {size:,}; dataset.too_long=drop leaves such out")
    num_bytes = int(encoding.tokenizer.num_bytes[ids[trained]].sum())
    signs = tuple(CHOSEN if verdict.is_good else REJECTED for verdict in verdicts)
    sizes = tuple(len(chat.ids) for chat in chats)
    return Judged(
        ids, num_bytes, number, epoch, trained=trained, place=document.place, verdicts=signs, sizes=sizes, scores=scores
    )


def _answer(verdict: Verdict, encoding: Encoding, bad: Callable[[str], DataError]) -> Chat:
    """The tokens of an answer behind its prompt; the first of all has no prediction."""
    chat = encode_example(verdict.example, encoding, bad)
    trained = chat.trained & (np.arange(len(chat.ids)) > 0)
    if not trained.any():
        raise DataError("expected a token that is trained in each answer, found none")
    return Chat(chat.ids, trained)
