"""The loss of a model on documents, each of which is read once: for each source, and for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import islice
from typing import Any

import attrs
import torch

from fnrecipe.build import make_evaluation, to_device, to_host
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.contract import check_batch_size
from fnrecipe.data import (
    Corpus,
    Document,
    Tokenizer,
    Tokens,
    map_windows,
    pipe,
    read_blocks,
    sift,
    tell_left_out,
    tokenized,
    tolerate,
)
from fnrecipe.data.windows import ScoredBatch, Window, collate_windows, rows_of_windows
from fnrecipe.errors import FnrecipeError, NonFiniteError, UsageError
from fnrecipe.loss import Loss, Sums
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import Evaluation
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang, joined, world_size
from fnrecipe.runtime.last_words import last_words
from fnrecipe.runtime.process_groups import axis_sizes, check_world_size, lane_assignment, make_mesh
from fnrecipe.runtime.transfer import fetch
from fnrecipe.shell.trained.evaluation_subject import Subject, params_of
from fnrecipe.tree import Tree

_SUMS = ("loss", "targets", "bytes", "documents")
_NO_ROW: Sequence[Window] = ()
_AT_ONCE = 64
"""Batches whose sums are fetched at a time."""
_LEAST_LENGTH = 64
"""Positions of a row, at least: fewer of them would not be faster."""


@attrs.frozen
class Score:
    """Sums over documents: the loss in nats, the targets, the bytes of text that these stand for, and the documents."""

    nats: float
    targets: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@attrs.frozen
class Scored:
    """What `score` finds for each source by its name; the step of a run's checkpoint, the length of a row, and the stride."""

    sources: Mapping[str, Score]
    step: int | None
    max_seq_len: int
    stride: int

    @property
    def total(self) -> Score:
        columns = zip(*(attrs.astuple(score) for score in self.sources.values()), strict=True)
        return Score(*map(sum, columns))


@attrs.frozen
class Size:
    """The shape of a batch: how many microbatches it has over all ranks, and the positions of its rows."""

    num_microbatches: int
    length: int


@attrs.frozen
class Place:
    """Where this process evaluates: among its gang, on a mesh, on a device."""

    gang: Gang
    mesh: Mesh
    device: torch.device


def score(found: Subject, stride: int | None = None, tell: Callable[[str], None] = lambda text: None) -> Scored:
    """The loss on each of `dataset.sources`, by the recipe's loss; any number of ranks of the gang finds the same bits.

    A document that is longer than a row is scored in windows of it, each of which begins `stride` tokens behind the one before:
    None: the length of a row, so that each is scored from its own beginning. `tell` gets the name of each source as it begins.

    Raises:
        UsageError: if there is no text, the stride is longer than a row, or the rows of a batch make no equal microbatches.
        NonFiniteError: if the loss is not a finite number.
    """
    length = found.config.dataset.max_seq_len
    step_size = length if stride is None else stride
    if not 1 <= step_size <= length:
        raise UsageError(f"--stride: expected at most dataset.max_seq_len = {length}, found {stride}")
    check_batch_size(found.recipe.name, found.config.dataset.batch_size, found.config.gang.num_microbatches)
    with placed(found) as place:
        corpora = found.corpora()
        tell_left_out(corpora if place.gang.leads else [])
        tokenizer = found.tokenizer
        params, step = params_of(found, place.gang, place.mesh, place.device)
        sums = cache(partial(_sums_of_batch, found, place))
        scores = {}
        for corpus in corpora:
            tell(corpus.name)
            batches = _batches(found, corpus, tokenizer, place.mesh, step_size)
            scores[corpus.name] = _score(batches, sums, params, place.device, corpus.name)
    return Scored(scores, step, length, step_size)


@contextmanager
def placed(found: Subject) -> Iterator[Place]:
    """This process's place, in the gang that its environment describes.

    Raises:
        UsageError: if the number of ranks does not divide what they share.
        FnrecipeError: if there is too little memory for what is done there.
    """
    config = found.config
    replicas, shards, _ = axis_sizes(config.gang, world_size())
    cut = {"gang.num_microbatches": config.gang.num_microbatches, "dataset.num_lanes": config.dataset.num_lanes}
    check_world_size(cut, replicas * shards)
    device = host.pick_device(config.gang.device)
    with ExitStack() as stack:
        gang = stack.enter_context(joined(device, config.gang.timeout))
        stack.enter_context(last_words(gang))
        host.prepare(config.common.torch, jit_mode(config.trainer.jit, device))
        try:
            yield Place(gang, make_mesh(config.gang, gang, device, found.recipe.rules(config)), device)
        except (MemoryError, RuntimeError) as error:
            if message := host.out_of_memory(error):
                raise FnrecipeError(message) from error
            raise


def _sums_of_batch(found: Subject, place: Place, size: Size) -> Callable[[Tree, Tree], Sums]:
    """`(params, batch) -> sums` of batches of a size; one function for all sources."""

    def loss(config: Any) -> Loss:
        one = attrs.evolve(config, dataset=attrs.evolve(config.dataset, sources=config.dataset.sources[:1]))
        of_recipe: Loss = (found.recipe.text_loss or found.recipe.loss)(one)

        def of_windows(params: Tree, batch: ScoredBatch, key: torch.Tensor | None = None) -> tuple[torch.Tensor, Sums]:
            total, sums = of_recipe(params, batch.batch, key)
            return total, {**{name: sums[name] for name in _SUMS if name in sums}, "documents": batch.documents.sum()}

        return of_windows

    gang, whole = found.config.gang, Size(found.config.gang.num_microbatches, found.config.dataset.max_seq_len)
    config = attrs.evolve(found.config, gang=attrs.evolve(gang, num_microbatches=size.num_microbatches))  # type: ignore[misc]
    evaluation = Evaluation(found.recipe.stream, loss)
    return make_evaluation(found.recipe, evaluation, config, place.mesh, place.device, compiled=size == whole)


def _batches(
    found: Subject, corpus: Corpus, tokenizer: Tokenizer, mesh: Mesh, stride: int
) -> Iterator[tuple[Size, ScoredBatch]]:
    """The windows of all documents of a source; every process reads all of them, and uses the rows of its microbatches."""
    dataset, ends = found.config.dataset, found.config.tokenizer
    limit = dataset.documents_per_row if dataset.attention == "document" else 1  # a row whose tokens see each other is one text
    documents = pipe(
        partial(read_blocks, blocks=corpus.blocks, read=corpus.read),
        partial(tolerate, limit=dataset.max_bad_records),
        partial(sift, reason=_empty, name=corpus.name),
        partial(tokenized, tokenizer=tokenizer, name=corpus.name, add_bos=ends.add_bos, add_eos=ends.add_eos),
        partial(sift, reason=_too_short, name=corpus.name, needed=False),
    )
    in_rows = partial(rows_of_windows, length=dataset.max_seq_len, stride=stride, limit=limit)
    rows = (row for row, _ in map_windows(documents, window=dataset.pack_window, function=in_rows))
    share = dataset.batch_size // found.config.gang.num_microbatches
    while batch := [*islice(rows, dataset.batch_size)]:
        size = _size(batch, share, dataset.max_seq_len, mesh.replica.size * mesh.shard.size)
        batch += [_NO_ROW] * (share * size.num_microbatches - len(batch))
        mine = lane_assignment(mesh, size.num_microbatches).lanes(size.num_microbatches)
        chosen = [row for number in mine for row in batch[share * number : share * (number + 1)]]
        yield size, collate_windows(chosen, size.length)


def _size(rows: Sequence[Sequence[Window]], share: int, length: int, ranks: int) -> Size:
    """The size for rows, `share` of them a microbatch: few sizes, each of which is traced, and the cost follows the text."""
    # Sums over microbatches are a fixed binary tree, and those of padding are 0: so the number of microbatches, of which each
    # rank needs one, changes no bit. The length does, and is the same for all ranks.
    longest = max(sum(len(window.tokens.ids) - 1 for window in row) for row in rows)
    num_microbatches = max(_power_of_two(math.ceil(len(rows) / share)), ranks)
    return Size(num_microbatches, min(max(_power_of_two(longest), _LEAST_LENGTH), length))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _score(
    batches: Iterator[tuple[Size, ScoredBatch]],
    sums: Callable[[Size], Callable[[Tree, Tree], Sums]],
    params: Tree,
    device: torch.device,
    name: str,
) -> Score:
    total = dict.fromkeys(_SUMS, 0.0)
    pending: list[Sums] = []

    def add() -> None:
        for row in fetch(pending, device).rows():
            total.update({key: total[key] + value for key, value in row.items()})
        pending.clear()

    for size, batch in batches:
        pending.append(sums(size)(params, to_device(to_host(batch, device), device)))
        if len(pending) == _AT_ONCE:
            add()
    add()
    if not total["targets"]:
        raise UsageError(
            f"{name}: expected text to score, found none: each document is empty, or of too few tokens to predict one"
        )
    if not math.isfinite(total["loss"]):
        raise NonFiniteError(f"{name}: the loss of the model is not finite")
    return Score(total["loss"], *(int(total[key]) for key in _SUMS[1:]))


def _empty(document: Document) -> str:
    return "" if document else "empty"


def _too_short(document: Tokens) -> str:
    return "" if len(document.ids) > 1 else "of fewer than 2 tokens"
