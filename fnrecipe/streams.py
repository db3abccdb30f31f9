"""The streams of packed rows that recipes train and are validated on, from the sections of a config.

What becomes of a source's documents before they are packed is the recipe's: it gives the stages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import attrs

from fnrecipe.config import (
    CommonSection,
    DatasetSection,
    DataSource,
    ModelSection,
    RegimeSection,
    TokenizerSection,
    source_names,
)
from fnrecipe.data import (
    Batch,
    Blocks,
    Corpus,
    Document,
    Format,
    LaneAssignment,
    Reading,
    Source,
    Stage,
    Stream,
    Tokenizer,
    Tokens,
    batch_lanes,
    cached,
    collate,
    concat,
    fills_an_epoch,
    growing,
    held_out,
    map_windows,
    mix,
    open_corpus,
    open_tokenizer,
    pack,
    permutation,
    pipe,
    read_blocks,
    readers_for,
    share,
    shuffled,
    unevenness,
    watch_padding,
    weights_between,
)
from fnrecipe.data.pack import Row
from fnrecipe.errors import UsageError

_log = logging.getLogger(__name__)
_EMPTY: Row = ()


class StreamConfig(Protocol):
    """What is read of a recipe's config."""

    @property
    def FORMATS(self) -> Mapping[str, Format]: ...  # noqa: N802 a table
    @property
    def model(self) -> ModelSection: ...
    @property
    def dataset(self) -> DatasetSection: ...
    @property
    def tokenizer(self) -> TokenizerSection: ...
    @property
    def regime(self) -> RegimeSection: ...
    @property
    def common(self) -> CommonSection: ...


C = TypeVar("C", bound=StreamConfig)

Split: TypeAlias = Callable[[Document], str]
"""Why a document is left out; empty if it is not."""


@attrs.frozen
class Part:
    """What one reader reads of a source in one epoch.

    name     what messages call it
    source   the source's name
    number   that stands for the source in batches
    epoch    how many times the source had been read before
    shuffle  the stages that put documents into a random order; none if they stay
    """

    name: str
    source: str
    number: int
    epoch: int
    shuffle: Sequence[Stage]


Stages: TypeAlias = Callable[[C, Tokenizer, Part, Split], Sequence[Stage]]
"""The stages from the documents of a part, and bad records among them, to the tokens of those of a split."""


@attrs.frozen
class Form:
    """What becomes of tokens.

    pack     (window of documents, its index, length=, limit=, key=) -> rows, as `fnrecipe.data.pack` makes them
    collate  (rows, length=) -> their batch, as `fnrecipe.data.collate` makes it
    """

    pack: Callable[..., Sequence[Row]] = pack
    collate: Callable[..., Any] = collate


TEXT = Form()


def train_stream(config: C, assignment: LaneAssignment, stages: Stages[C], form: Form = TEXT) -> Source[Batch]:
    """The training documents, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    tokenizer = make_tokenizer(config)
    corpora = _train_corpora(config, tokenizer)
    if assignment.rank == assignment.worker == 0:
        _tell_unevenness(config, corpora)
    return pipe(_train_batches(config, assignment, corpora, tokenizer, stages, form), watch_padding)


def train_documents(config: C, assignment: LaneAssignment, stages: Stages[C], form: Form = TEXT) -> Source[Sequence[str]]:
    """Where the documents of each batch of `train_stream` are, each once; the cursors are the same."""
    tokenizer = make_tokenizer(config)
    corpora = _train_corpora(config, tokenizer)
    return _train_batches(config, assignment, corpora, tokenizer, stages, attrs.evolve(form, collate=_places))


def _places(rows: Sequence[Row], length: int) -> Sequence[str]:
    return list(dict.fromkeys(piece.place() for row in rows for piece in row if piece.place is not None))


def _train_corpora(config: StreamConfig, tokenizer: Tokenizer) -> list[Corpus]:
    return open_sources(config, config.dataset.sources, tokenizer, by_document=config.dataset.order == "documents")


def _train_batches(
    config: C, assignment: LaneAssignment, corpora: Sequence[Corpus], tokenizer: Tokenizer, stages: Stages[C], form: Form
) -> Source[Any]:
    dataset = config.dataset
    split = partial(_left_out, fraction=dataset.valid_fraction, valid=False)
    weights = weights_between([_weights(source) for source in dataset.sources], scale=num_readers(config, corpora))
    blend = partial(mix, weights=weights, epochs=config.regime.num_data_epochs, finished=dataset.finished_source)
    of_part = partial(_stages, stages=stages, config=config, tokenizer=tokenizer, split=split)
    return batches(config, assignment, corpora, of_part, blend, dataset.order, form)


def valid_stream(config: C, assignment: LaneAssignment, stages: Stages[C], form: Form = TEXT) -> Source[Batch]:
    """The validation documents, once, in a random order that stays: the first batches are a fair sample of all."""
    fraction = 1.0 if config.dataset.valid_sources else config.dataset.valid_fraction
    if not fraction:
        return lambda cursor: iter(())
    split = partial(_left_out, fraction=fraction, valid=True)
    tokenizer = make_tokenizer(config)
    corpora = open_sources(config, config.dataset.valid_sources or config.dataset.sources, tokenizer)
    blend = partial(mix, weights=lambda total: [1.0] * len(corpora), epochs=1)
    of_part = partial(_stages, stages=stages, config=config, tokenizer=tokenizer, split=split, use=" (validation)")
    return batches(config, assignment, corpora, of_part, blend, "blocks", form)


def batches(
    config: StreamConfig,
    assignment: LaneAssignment,
    corpora: Sequence[Corpus],
    stages: Callable[[Part], Sequence[Stage]],
    blend: Callable[..., Stream[Tokens]],
    order: str,
    form: Form = TEXT,
) -> Source[Batch]:
    """Every reader reads its share of each source, blends the sources by tokens and packs rows for its lanes."""
    dataset, seed = config.dataset, config.common.seed
    size = num_readers(config, corpora)
    fed = dataset.num_lanes // size  # lanes that a reader feeds, each of which is worth a window of documents
    numbers = [source_list(config).index(corpus.name) for corpus in corpora]

    def blocks(corpus: Corpus, reader: int, epoch: int) -> Blocks:
        mine = share(corpus.blocks, reader, size, None if order == "sequential" else (seed, epoch))
        return mine if order == "sequential" else mine.take(permutation(len(mine), seed, reader, epoch))

    def tokens(corpus: Corpus, number: int, reader: int, epoch: int) -> Source[Tokens]:
        name = f"{corpus.name} (reader {reader} of {size})" if size > 1 else corpus.name
        shuffle: list[Stage] = []
        if order == "blocks" and dataset.shuffle_window > 1:
            mixed = partial(_shuffled, key=(seed, reader, epoch))
            shuffle.append(partial(map_windows, window=fed * dataset.shuffle_window, function=mixed))
        part = Part(name, corpus.name, number, epoch, shuffle)
        return pipe(partial(read_blocks, blocks=blocks(corpus, reader, epoch), read=corpus.read), *stages(part))

    def rows(reader: int) -> Source[Row]:
        parts = [partial(tokens, *source, reader) for source in zip(corpora, numbers, strict=True)]
        documents = partial(blend, parts, size=lambda document: len(document.ids))
        if dataset.packing == "concat":
            return pipe(documents, partial(concat, length=dataset.max_seq_len, limit=dataset.documents_per_row))
        key = None if order == "sequential" else (seed, reader)
        packed = partial(form.pack, length=dataset.max_seq_len, limit=dataset.documents_per_row, key=key)
        sizes, ends = growing(dataset.pack_window, fed), partial(fills_an_epoch, length=dataset.max_seq_len)
        return pipe(documents, partial(map_windows, window=sizes, function=packed, ends=ends))

    return partial(
        batch_lanes,
        [rows(reader) for reader in range(size)],
        num_lanes=dataset.num_lanes,
        rows_per_lane=dataset.batch_size // dataset.num_lanes,
        collate=partial(form.collate, length=dataset.max_seq_len),
        padding=_EMPTY,
        assignment=assignment,
    )


def example(config: StreamConfig, rows: int, form: Form = TEXT) -> Batch:
    """A batch of rows of padding."""
    batch: Batch = form.collate([_EMPTY] * rows, length=config.dataset.max_seq_len)
    return batch


def num_readers(config: StreamConfig, corpora: Sequence[Corpus]) -> int:
    """How many readers share the sources: as the config says, or as many as it takes by their size."""
    num_bytes = sum(file.size for corpus in corpora for file in corpus.files)
    return config.dataset.num_readers or readers_for(num_bytes, config.dataset.num_lanes)


def open_sources(
    config: StreamConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, *, by_document: bool = False
) -> list[Corpus]:
    """The sources' files, cut into blocks, with the token cache behind them if there is one."""
    opened = [
        open_corpus(
            source.path,
            tokenizer,
            name=name,
            format=None if source.format == "auto" else source.format,
            reading=Reading(source.text_key, source.separator, source.dtype, config.dataset.max_record_bytes),
            by_document=by_document,
            formats=config.FORMATS,
        )
        for source, name in zip(sources, source_names(sources), strict=True)
    ]
    if config.dataset.cache is None:
        return opened
    folder = Path(config.dataset.cache)
    return [attrs.evolve(c, read=partial(cached, read=c.read, tokenizer=tokenizer, folder=folder)) for c in opened]


def all_corpora(config: StreamConfig) -> list[Corpus]:
    """The sources of training and of validation, in the order of the numbers that stand for them in batches."""
    dataset = config.dataset
    return open_sources(config, [*dataset.sources, *dataset.valid_sources], make_tokenizer(config))


def source_list(config: StreamConfig) -> list[str]:
    """The names of the sources of training and of validation, in the same order."""
    return source_names([*config.dataset.sources, *config.dataset.valid_sources])


def make_tokenizer(config: StreamConfig) -> Tokenizer:
    """The tokenizer of the config.

    Raises:
        UsageError: if it has more tokens than the model has embeddings.
    """
    tokenizer, size = tokenizer_of(config.tokenizer), config.model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise UsageError(f"model.config.vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {size}")
    return tokenizer


def tokenizer_of(section: TokenizerSection) -> Tokenizer:
    """The tokenizer that a section says."""
    return open_tokenizer(
        section.family,
        section.path,
        bos_token=section.bos_token,
        eos_token=section.eos_token,
        pattern=section.pattern,
        special_tokens=section.special_tokens,
    )


def _stages(part: Part, *, stages: Stages[C], config: C, tokenizer: Tokenizer, split: Split, use: str = "") -> Sequence[Stage]:
    """The recipe's stages of a part, which messages name with what it is used for, if that is not training."""
    return stages(config, tokenizer, attrs.evolve(part, name=f"{part.name}{use}"), split)


def _tell_unevenness(config: StreamConfig, corpora: Sequence[Corpus]) -> None:
    """A line for what several readers leave uneven, and for workers that have no reader of their own."""
    size, workers = num_readers(config, corpora), config.dataset.num_workers
    if size > 1:
        shares = ", ".join(f"{corpus.name} {unevenness(corpus.blocks, size):.1%}" for corpus in corpora)
        apart = "each with a share of the data of its own: their epochs may end apart (dataset.num_readers=1: exactly together)"
        _log.warning("%d readers, %s; the largest share is above the mean by: %s", size, apart, shares)
    if workers > size:
        why = "the readers of this data (dataset.num_readers): workers that share one do the same work"
        _log.warning("dataset.num_workers: expected at most %d, %s; found %d", size, why, workers)


def _weights(source: DataSource) -> list[tuple[int, float]]:
    return [(0, source.weight), *source.weight_schedule]


def _left_out(document: Document, *, fraction: float, valid: bool) -> str:
    """Why a document is no part of the split for training or validation; empty if it is one."""
    if not document:
        return "empty"
    if held_out(document, fraction) == valid:
        return ""
    return "for training (dataset.valid_fraction)" if valid else "held out for validation (dataset.valid_fraction)"


def _shuffled(documents: Sequence[Document], index: int, *, key: tuple[int, ...]) -> list[Document]:
    return shuffled(documents, *key, index)
