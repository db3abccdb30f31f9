"""Multiple choice: questions in JSON lines, and the tokens of a context and of what may follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import orjson

from fnrecipe.data.files import opened
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.errors import SHOWN, UsageError, did_you_mean, shortened

_KEYS = ("context", "choices", "answer")


@attrs.frozen
class Question:
    """A context, what may follow it, and the index of what does; and the place of its line, `FILE:LINE`."""

    context: str
    choices: Sequence[str]
    answer: int
    place: str


@attrs.frozen(eq=False)
class Continuation:
    """Token ids to be scored behind token ids that are given; `lost` of the latter were cut off at their beginning."""

    given: Sequence[int]
    ids: Sequence[int]
    lost: int = 0


def read_questions(path: str) -> list[Question]:
    """The questions in a file, one JSON object a line: `{"context": …, "choices": […], "answer": index}`.

    Raises:
        UsageError: a line for each line that is none, for the first of them; if there is no question.
        DataError: if the file cannot be read.
    """
    questions, problems = list[Question](), list[str]()
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            found = _question(line, place)
            if isinstance(found, Question):
                questions.append(found)
            else:
                problems.append(f"{place}: {found}")
    if problems:
        more = len(problems) - SHOWN
        raise UsageError("\n".join([*problems[:SHOWN], *([f"  … and {more:,} more lines"] if more > 0 else [])]))
    if not questions:
        raise UsageError(f"{path}: expected a question on each line, found none")
    return questions


def _question(line: bytes, place: str) -> Question | str:
    """The question in a line, or why there is none."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"expected a JSON object, found {error.msg}"
    if not isinstance(values, dict):
        return f"expected a JSON object, found {type(values).__name__}"
    for key in _KEYS:
        if key not in values:
            return f"expected the field {key!r}, found none; {did_you_mean(key, values)}".removesuffix("; ")
    context, choices, answer = (values[key] for key in _KEYS)
    if not isinstance(context, str):
        return f"expected text in the field 'context', found {type(context).__name__}"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f"expected a list of at least 2 texts in the field 'choices', found {shortened(repr(choices), 80)}"
    if "" in choices:
        return f"expected text in each of the choices, found none in number {choices.index('')}"
    if type(answer) is not int or not 0 <= answer < len(choices):
        expected = f"expected the index of one of {len(choices)} choices, from 0, in the field 'answer'"
        return f"{expected}, found {shortened(repr(answer), 80)}"
    return Question(context, tuple(choices), answer, place)


def continuations(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, add_bos: bool, length: int) -> list[Continuation]:
    """For each (context, continuation): the ids of the continuation, those that `encode(context + continuation)` has behind as
    many as `encode(context)` has. So lm-evaluation-harness does it: white space at the end of the context counts to the
    continuation, and a context without a token is BOS.

    A row has `length` inputs. Of a pair that is longer, ids at the beginning of the context are left out.

    Raises:
        UsageError: if a continuation has no token of its own, or more than `length` of them.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    before = tokenizer.encode(contexts)
    whole = tokenizer.encode([context + continuation for context, continuation in pairs])
    found = []
    for (context, continuation), given, ids in zip(pairs, before, whole, strict=True):
        begin = [tokenizer.bos] if add_bos or not len(given) else []
        own = ids[len(given) :].tolist()
        if not own or len(own) > length:
            what = "none" if not own else f"{len(own):,}"
            where = f"{shortened(repr(continuation), 40)} behind {shortened(repr(context), 40)}"
            raise UsageError(f"expected 1 to {length:,} tokens (dataset.max_seq_len) in {where}, found {what}")
        kept = [*begin, *ids[: len(given)].tolist()]
        lost = max(len(kept) + len(own) - 1 - length, 0)
        found.append(Continuation(kept[lost:], own, lost))
    return found


@attrs.frozen
class Mean:
    """The mean of a measure over questions, and its standard error: the root of the sample's variance by their number."""

    value: float
    stderr: float


def mean(values: Sequence[float]) -> Mean:
    n, total = len(values), math.fsum(values)
    if n < 2:
        return Mean(total / n, math.nan)
    variance = math.fsum((value - total / n) ** 2 for value in values) / (n - 1)
    return Mean(total / n, math.sqrt(variance / n))


@attrs.frozen
class Accuracy:
    """How often the right choice is the likeliest.

    acc        by the log-likelihood of its tokens
    acc_norm   by that divided by the bytes of its text
    centred    (acc - chance) / (1 - chance): 0 for a guess, 1 if all are right
    chance     the mean of 1 / choices
    """

    questions: int
    acc: Mean
    acc_norm: Mean
    centred: Mean
    chance: float


def accuracy(questions: Sequence[Question], log_likelihoods: Sequence[Sequence[float]]) -> Accuracy:
    """The accuracy by the log-likelihoods of each question's choices; of equal ones, the first counts."""
    by_sum, by_bytes = [], []
    for question, found in zip(questions, log_likelihoods, strict=True):
        each = [value / len(choice.encode()) for value, choice in zip(found, question.choices, strict=True)]
        by_sum.append(float(found.index(max(found)) == question.answer))
        by_bytes.append(float(each.index(max(each)) == question.answer))
    chance = math.fsum(1 / len(question.choices) for question in questions) / len(questions)
    acc = mean(by_sum)
    centred = Mean((acc.value - chance) / (1 - chance), acc.stderr / (1 - chance))
    return Accuracy(len(questions), acc, mean(by_bytes), centred, chance)
