"""The accuracy of a model on multiple choice: of the choices of a question, it chooses the likeliest behind the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import attrs
import torch

from fnrecipe import presets
from fnrecipe.compiler.modes import BACKENDS, jit_mode
from fnrecipe.compiler.pure import without_draws
from fnrecipe.data.choices import Accuracy, Continuation, Question, accuracy, continuations, read_questions
from fnrecipe.errors import NonFiniteError, UsageError
from fnrecipe.models.likelihood import likelihoods, rows_of
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.shell.score import Place, placed
from fnrecipe.shell.subject import Subject, params_of
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree


@attrs.frozen
class Chosen:
    """What `choose` finds: the accuracy; choices whose context was cut to fit, and of how many there are; a run's step."""

    accuracy: Accuracy
    cut: int
    choices: int
    step: int | None


def choose(found: Subject, path: str, delimiter: str = "") -> Chosen:
    """The accuracy on the questions in a file, with `delimiter` between context and choice, over the ranks of the gang.

    Ranks take batches of rows in turn: each is computed whole by one of them, and any number of ranks finds the same bits.

    Raises:
        UsageError: if the file has no questions, or a line of it is none; if the config shards parameters.
        NonFiniteError: if a log-likelihood is not a number.
    """
    if found.config.gang.sharding != "replicate" or found.config.gang.tensor_parallel_size > 1:
        raise UsageError("gang.sharding: expected replicate, and gang.tensor_parallel_size=1, for --choices")
    questions = read_questions(path)
    ids = _continuations(found, questions, delimiter)
    with placed(found) as place:
        params, step = params_of(found, place.gang, Mesh(), place.device)
        values = iter(_log_likelihoods(found, place, params, ids))
    grouped = [[next(values) for _ in question.choices] for question in questions]
    for question, each in zip(questions, grouped, strict=True):
        if not all(map(math.isfinite, each)):
            raise NonFiniteError(f"{question.place}: the log-likelihood of a choice is not finite")
    return Chosen(accuracy(questions, grouped), sum(each.lost > 0 for each in ids), len(ids), step)


def _continuations(found: Subject, questions: Sequence[Question], delimiter: str) -> list[Continuation]:
    encode = partial(
        continuations,
        tokenizer=found.tokenizer,
        add_bos=found.config.tokenizer.add_bos,
        length=found.config.dataset.max_seq_len,
    )
    ids: list[Continuation] = []
    for question in questions:
        try:
            ids += encode([(question.context, delimiter + choice) for choice in question.choices])
        except UsageError as error:
            raise UsageError(f"{question.place}: {error}") from None
    return ids


def _log_likelihoods(found: Subject, place: Place, params: Tree, ids: Sequence[Continuation]) -> list[float]:
    """The log-likelihood of each continuation: rows are as long as the longest, so that one function is traced."""
    config, gang = found.config, place.gang
    function = likelihoods(presets.apply(config.model, config.trainer, "row"))  # a row is one text
    mode = jit_mode(config.trainer.jit, place.device)
    run = without_draws(function) if mode == "off" else jit(function, backend=BACKENDS[mode])
    length = max(len(each.given) + len(each.ids) - 1 for each in ids)
    mine: dict[int, list[float]] = {}
    with torch.no_grad():
        for number, rows in enumerate(rows_of(ids, config.dataset.batch_size, length)):
            if number % gang.size == gang.rank:
                moved = (tensor.to(place.device) for tensor in (rows.tokens, rows.targets, rows.mask))
                mine[number] = run(params, *moved)[0].tolist()
    batches = {int(number): each for part in all_gather_objects(gang, mine) for number, each in part.items()}
    flat = [value for number in sorted(batches) for value in batches[number]]
    return flat[: len(ids)]
