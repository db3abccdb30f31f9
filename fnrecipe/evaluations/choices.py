"""Multiple choice in parts: of the choices of a question, a model chooses the likeliest behind the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch

from fnrecipe import presets
from fnrecipe.compiler import Backend
from fnrecipe.compiler.pure import without_draws
from fnrecipe.data import Tokenizer
from fnrecipe.data.choices import Accuracy, Continuation, Question, accuracy, continuations, read_questions
from fnrecipe.errors import NonFiniteError, UsageError
from fnrecipe.evaluations.config import TextConfig
from fnrecipe.models.likelihood import Likelihoods, likelihoods, rows_of
from fnrecipe.recipe import Findings, Measure
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree

Part = Callable[[Tree], list[float]]


@attrs.frozen(eq=False)
class Questions:
    """Questions, and the continuation of each of their choices, one question's after the other's."""

    questions: Sequence[Question]
    ids: Sequence[Continuation]

    @property
    def cut(self) -> int:
        """Choices whose context was cut to fit."""
        return sum(each.lost > 0 for each in self.ids)


def open_questions(config: TextConfig, tokenizer: Tokenizer, path: str, delimiter: str) -> Questions:
    """The questions in a file, with `delimiter` between context and choice.

    Raises:
        UsageError, DataError: if the file has no questions, or a line of it is none, or one that does not fit.
    """
    questions = read_questions(path)
    encode = partial(continuations, tokenizer=tokenizer, add_bos=config.tokenizer.add_bos, length=config.dataset.max_seq_len)
    ids: list[Continuation] = []
    for question in questions:
        try:
            ids += encode([(question.context, delimiter + choice) for choice in question.choices])
        except UsageError as error:
            raise UsageError(f"{question.place}: {error}") from None
    return Questions(questions, ids)


def log_likelihoods(config: TextConfig, found: Questions, device: torch.device, backend: Backend | None) -> list[Part]:
    """The log-likelihoods of the choices, a batch of rows at a time: all as long as the longest, for one traced function.

    Batches are of one size too, and fewer rows of the last one are padding than there are batches.
    """
    function = likelihoods(presets.apply(config.model, config.trainer, "row"))  # a row is one text
    run = without_draws(function) if backend is None else jit(function, backend=backend)
    length = max(len(each.given) + len(each.ids) - 1 for each in found.ids)
    batches = math.ceil(len(found.ids) / config.dataset.batch_size)
    rows = math.ceil(len(found.ids) / batches)
    return [partial(_of_rows, run, found.ids, start, rows, length, device) for start in range(0, len(found.ids), rows)]


def total(found: Questions, parts: Sequence[Sequence[float]]) -> Accuracy:
    """The accuracy by what the parts gave.

    Raises:
        NonFiniteError: if a log-likelihood is not a number.
    """
    values = iter([value for part in parts for value in part])
    grouped = [[next(values) for _ in question.choices] for question in found.questions]
    for question, each in zip(found.questions, grouped, strict=True):
        if not all(map(math.isfinite, each)):
            raise NonFiniteError(f"{question.place}: the log-likelihood of a choice is not finite")
    return accuracy(found.questions, grouped)


def choices(
    config: TextConfig, tokenizer: Tokenizer, path: str, delimiter: str, device: torch.device, backend: Backend | None
) -> Measure[list[float]]:
    """The accuracy on the questions in a file, as numbers to record."""
    found = open_questions(config, tokenizer, path, delimiter)

    def numbers(parts: Sequence[list[float]]) -> Findings:
        made = total(found, parts)
        return Findings({"acc": made.acc.value, "acc_norm": made.acc_norm.value, "acc_centred": made.centred.value})

    return Measure(log_likelihoods(config, found, device, backend), numbers)


def _of_rows(
    run: Likelihoods, ids: Sequence[Continuation], start: int, size: int, length: int, device: torch.device, params: Tree
) -> list[float]:
    some = ids[start : start + size]
    (rows,) = rows_of(some, size, length)
    with torch.no_grad():
        found: list[float] = run(params, *(t.to(device) for t in (rows.tokens, rows.targets, rows.mask)))[0].tolist()
    return found[: len(some)]
