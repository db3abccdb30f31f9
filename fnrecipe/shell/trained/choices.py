"""The accuracy of a model on multiple choice: of the choices of a question, it chooses the likeliest behind the context."""

from __future__ import annotations

import attrs

from fnrecipe.compiler.modes import BACKENDS, jit_mode
from fnrecipe.data.choices import Accuracy
from fnrecipe.errors import UsageError
from fnrecipe.evaluations.choices import log_likelihoods, open_questions, total
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.shell.evaluate import in_turn
from fnrecipe.shell.trained.evaluation_subject import Subject, params_of
from fnrecipe.shell.trained.score import placed


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
    config = found.config
    if config.gang.sharding != "replicate" or config.gang.tensor_parallel_size > 1:
        raise UsageError("gang.sharding: expected replicate, and gang.tensor_parallel_size=1, for --choices")
    questions = open_questions(config, found.tokenizer, path, delimiter)
    with placed(found) as place:
        params, step = params_of(found, place.gang, Mesh(), place.device)
        mode = jit_mode(config.trainer.jit, place.device)
        parts = log_likelihoods(config, questions, place.device, None if mode == "off" else BACKENDS[mode])
        values = in_turn(place.gang, parts, params)
    return Chosen(total(questions, values), questions.cut, len(questions.ids), step)
