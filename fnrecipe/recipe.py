"""A recipe: an immutable value of a config and pure functions of it. Everything else about a run lives in the shell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import attrs
from torch import Tensor

from fnrecipe.config.needs import Need
from fnrecipe.contract import check_config
from fnrecipe.data import Corpus, LaneAssignment, Source, Tokenizer
from fnrecipe.loss import Loss
from fnrecipe.models.flops import TokenFlops
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree

C = TypeVar("C")


@attrs.frozen
class Recipe(Generic[C]):
    """What is trained, on what, and how. A config without what every run reads is refused at once, by a UsageError.

    config    the defaults: an attrs value with at least the sections gang, trainer, dataset, regime and common
    init      (config, key, place) -> parameters, each of them as `place(path, leaf)` leaves it (`fnrecipe.parallel.mesh`)
    loss      config -> loss, as in `fnrecipe.loss`
    update    config -> transform, as in `fnrecipe.optim`
    stream    (config, assignment) -> source of training batches: trees of NumPy arrays (`fnrecipe.data.rows`), each of as many
              rows as `assignment.rows(config.dataset.batch_size)` says; ends where this process has no rows left
    example   (config, rows) -> a batch of so many rows that add nothing to the loss and its sums, as `stream` gives them
    validate  (config, assignment) -> source of validation batches, or None
    sample    (config, parameters, key) -> text to show at the end, or None; gets the parameters that the loss gets
    corpora   config -> the corpora that the streams read: for their fingerprints, and for `fnrecipe data`
    tokenizer config -> the tokenizer that made the tokens: for the run's identity, and for `fnrecipe data`
    positions config -> positions of a row, padding included, for which the model computes something: tokens, say; 1 by default
    flops     config -> FLOPs of the model a position, to tell how well a device is used, or None
    needs     (config, processes) -> the least memory of each, to refuse what cannot fit before it is tried, or None
    rules     patterns of parameter paths, and the dimension along which tensor parallelism cuts them
    """

    name: str
    config: C = attrs.field(validator=lambda recipe, _, config: check_config(recipe.name, config))
    init: Callable[[C, Tensor, Placement], Tree]
    loss: Callable[[C], Loss]
    update: Callable[[C], Transform]
    stream: Callable[[C, LaneAssignment], Source[Tree]]
    example: Callable[[C, int], Tree]
    validate: Callable[[C, LaneAssignment], Source[Tree]] | None = None
    sample: Callable[[C, Tree, Tensor], str] | None = None
    corpora: Callable[[C], Sequence[Corpus]] | None = None
    tokenizer: Callable[[C], Tokenizer] | None = None
    positions: Callable[[C], int] = lambda config: 1
    flops: Callable[[C], TokenFlops] | None = None
    needs: Callable[[C, int], Sequence[Need]] | None = None
    rules: Mapping[str, int] = attrs.field(factory=dict)
