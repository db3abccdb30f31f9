"""A recipe: an immutable value of a config and pure functions of it. Everything else about a run lives in the shell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import attrs
import torch
from torch import Tensor

from fnrecipe.config import ShellConfig
from fnrecipe.config.needs import Need
from fnrecipe.contract import check_config
from fnrecipe.data import Corpus, LaneAssignment, Source, Tokenizer
from fnrecipe.loss import Loss
from fnrecipe.models.flops import TokenFlops
from fnrecipe.observe import Observer
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree

if TYPE_CHECKING:
    from pathlib import Path

C = TypeVar("C", bound=ShellConfig)
T = TypeVar("T")

Row: TypeAlias = Mapping[str, float]
"""Numbers by name, among them `step`."""


class Write(Protocol):
    """Records rows of a kind: "train", "perf", the name of an evaluation, or one of an observer's own."""

    def __call__(self, kind: str, rows: Sequence[Row], /) -> None: ...


Recorder: TypeAlias = "Callable[[Path, int], AbstractContextManager[Write]]"
"""(the run's directory, the step that the run goes on from) -> a writer, for as long as the context lasts.

What was recorded of later steps is dropped, for these are made again.
"""


@attrs.frozen
class Evaluation(Generic[C]):
    """What is measured beside training.

    stream  (config, assignment) -> source of batches, from its beginning each time; `regime.num_validation_batches` are read
    loss    config -> a loss, whose sums are recorded; None: the recipe's own
    every_n_steps  None: `regime.validate_every_n_steps`
    """

    stream: Callable[[C, LaneAssignment], Source[Tree]]
    loss: Callable[[C], Loss] | None = None
    every_n_steps: int | None = None


@attrs.frozen
class Findings:
    """Numbers that are recorded as NAME/…, and texts, JSON objects that are kept in `samples/NAME.jsonl` with their step."""

    numbers: Mapping[str, float]
    texts: Sequence[Mapping[str, str | int]] = ()


@attrs.frozen
class Measure(Generic[T]):
    """What is measured of a model, in parts that ranks take in turn: so any number of them finds the same bits.

    parts  each whole parameters of the model -> a JSON value
    total  these values, in order -> what is found
    """

    parts: Sequence[Callable[[Tree], T]]
    total: Callable[[Sequence[T]], Findings]


@attrs.frozen
class Measurement(Generic[C]):
    """What is measured of the model beside training by other means than a loss on a stream.

    make           (config, device) -> measure; before the run begins, so that it reads the files that it needs
    every_n_steps  None: as validations
    """

    make: Callable[[C, torch.device], Measure[Any]]
    every_n_steps: int | None = None


@attrs.frozen
class Recipe(Generic[C]):
    """What is trained, on what, and how. A config without what every run reads is refused at once, by a UsageError.

    config    the defaults: an attrs value with at least the sections gang, trainer, dataset, regime and common
    init      (config, key, place) -> parameters on the key's device, each as `place(path, leaf)` leaves it
    loss      config -> loss, as in `fnrecipe.loss`
    update    config -> transform, as in `fnrecipe.optim`
    trains    (config, path, parameter) -> whether that is trained, or frozen; the tensor has no numbers (`fnrecipe.optim.Mask`)
    stream    (config, assignment) -> source of training batches: trees of NumPy arrays (`fnrecipe.data.rows`), each of as many
              rows as `assignment.rows(config.dataset.batch_size)` says; ends where this process has no rows left
    documents (config, assignment) -> source of where the documents of each batch of `stream` are, as FILE:LINE, by the same
              cursors, to say which ones made a spike; who replaces `stream` replaces it too. None: nobody knows
    example   (config, rows) -> a batch of so many rows that add nothing to the loss and its sums, as `stream` gives them
    evaluations  config -> what is measured at its steps and at the end, by name: numbers are recorded as NAME/loss, NAME/…
    observers    (config, write) -> observers of the run's ticks (`fnrecipe.observe`), which may record rows of their own
    recorders    config -> who records numbers, beside those that the config names
    sample    (config, parameters, key) -> text to show at the end, or None; gets the parameters that the loss gets
    corpora   config -> the corpora that the streams read: for their fingerprints, and for `fnrecipe data`
    tokenizer config -> the tokenizer that made the tokens: for the run's identity, and for `fnrecipe data`
    scored    (config, device) -> the records that it trains on, as JSON objects, with what a frozen model says of each: for
              `fnrecipe data score`, that no run need ask that model again
    positions config -> positions of a row, padding included, for which the model computes something: tokens, say; 1 by default
    flops     config -> FLOPs of the model a position, to tell how well a device is used, or None if they are not known
    needs     (config, processes) -> the least memory of each, to refuse what cannot fit before it is tried, or None
    rules     config -> patterns of parameter paths, and the dimension along which tensor parallelism cuts them
    pretrained  what `init` is given -> parameters that are read from files, placed likewise; None where the config names none.
              A run that begins has these; `init` only says what they are like. None: the recipe has no such thing
    model     (config, parameters) -> those of the model that is trained, without what is beside them for the loss alone: these
              are exported, evaluated on text and generate
    text_loss config -> the loss on plain text, by which `fnrecipe evaluate` measures the model; None: `loss`
    origin    the name by which `fnrecipe.shell.find_recipe` found it, for `fnrecipe.load`; None for one that was made in place
    """

    name: str
    config: C = attrs.field(validator=lambda recipe, _, config: check_config(recipe.name, config))
    init: Callable[[C, Tensor, Placement], Tree]
    loss: Callable[[C], Loss]
    update: Callable[[C], Transform]
    stream: Callable[[C, LaneAssignment], Source[Tree]]
    example: Callable[[C, int], Tree]
    evaluations: Callable[[C], Mapping[str, Evaluation[C] | Measurement[C]]] = lambda config: {}
    observers: Callable[[C, Write], Sequence[Observer]] = lambda config, write: ()
    recorders: Callable[[C], Sequence[Recorder]] = lambda config: ()
    documents: Callable[[C, LaneAssignment], Source[Sequence[str]]] | None = None
    sample: Callable[[C, Tree, Tensor], str] | None = None
    corpora: Callable[[C], Sequence[Corpus]] | None = None
    tokenizer: Callable[[C], Tokenizer] | None = None
    scored: Callable[[C, torch.device], Iterator[Mapping[str, object]]] | None = None
    positions: Callable[[C], int] = lambda config: 1
    flops: Callable[[C], TokenFlops | None] | None = None
    needs: Callable[[C, int], Sequence[Need]] | None = None
    trains: Callable[[C, str, Tensor], bool] = lambda config, path, parameter: True
    rules: Callable[[C], Mapping[str, int]] = lambda config: {}
    pretrained: Callable[[C, Tensor, Placement], Tree | None] | None = None
    model: Callable[[C, Tree], Tree] = lambda config, params: params
    text_loss: Callable[[C], Loss] | None = None
    origin: str | None = None
