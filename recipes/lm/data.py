"""The stream of the language-model recipe: which stages, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from fnrecipe.config import DataSource, source_names
from fnrecipe.data import (
    Batch,
    Blocks,
    Corpus,
    Document,
    Place,
    Reading,
    Source,
    Tokenizer,
    Tokens,
    byte_tokenizer,
    cached,
    concat,
    deal,
    growing,
    held_out,
    huggingface_tokenizer,
    keep,
    mix,
    open_corpus,
    pack,
    permutation,
    pipe,
    read_blocks,
    regroup,
    shuffled,
    tokenized,
    tolerate,
    weights_between,
)
from fnrecipe.data.pack import Row
from fnrecipe.errors import UsageError

from .config import LMConfig

Split = Callable[[Document], bool]


def train_stream(config: LMConfig, place: Place) -> Source[Batch]:
    """The training documents, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    fraction = config.dataset.valid_fraction
    split: Split = lambda document: bool(document) and not held_out(document, fraction)  # noqa: E731
    weights = weights_between([_weights(source) for source in config.dataset.sources], scale=config.dataset.num_lanes)
    blend = partial(mix, weights=weights, epochs=config.regime.num_data_epochs, finished=config.dataset.finished_source)
    return batches(config, place, config.dataset.sources, split, blend, config.dataset.order)


def valid_stream(config: LMConfig, place: Place) -> Source[Batch]:
    """The validation documents, once, in a random order that stays: the first batches are a fair sample of all."""
    fraction = 1.0 if config.dataset.valid_sources else config.dataset.valid_fraction
    if not fraction:
        return lambda cursor: iter(())
    split: Split = lambda document: bool(document) and held_out(document, fraction)  # noqa: E731
    sources = config.dataset.valid_sources or config.dataset.sources
    blend = partial(mix, weights=lambda total: [1.0] * len(sources), epochs=1)
    return batches(config, place, sources, split, blend, "blocks")


def batches(
    config: LMConfig, place: Place, sources: Sequence[DataSource], split: Split, blend: Callable[..., Any], order: str
) -> Source[Batch]:
    """Every lane reads its blocks of each source, blends the sources by tokens and packs its own rows."""
    dataset, ends, seed = config.dataset, config.tokenizer, config.common.seed
    tokenizer = make_tokenizer(config)
    corpora = open_sources(config, sources, tokenizer, by_document=order == "documents")
    numbers = [source_list(config).index(corpus.name) for corpus in corpora]

    def blocks(corpus: Corpus, lane: int, epoch: int) -> Blocks:
        if order == "sequential":
            return corpus.blocks.take(slice(lane, None, dataset.num_lanes))
        mine = corpus.blocks.take(permutation(len(corpus.blocks), seed)[lane :: dataset.num_lanes])
        return mine.take(permutation(len(mine), seed, lane, epoch))

    def tokens(corpus: Corpus, number: int, lane: int, epoch: int) -> Source[Tokens]:
        encoded = partial(
            tokenized, tokenizer=tokenizer, name=corpus.name, number=number, add_bos=ends.add_bos, add_eos=ends.add_eos
        )
        stages: list[Any] = [
            partial(tolerate, limit=dataset.max_bad_records),
            partial(keep, where=split),
            encoded,
        ]
        if order == "blocks" and dataset.shuffle_window > 1:
            mixed = partial(_shuffled, key=(seed, lane, epoch))
            stages.insert(2, partial(regroup, window=dataset.shuffle_window, function=mixed))
        return pipe(partial(read_blocks, blocks=blocks(corpus, lane, epoch), read=corpus.read), *stages)

    def lane(number: int) -> Source[Row]:
        parts = [partial(tokens, *source, number) for source in zip(corpora, numbers, strict=True)]
        documents = partial(blend, parts, size=lambda document: len(document.ids))
        if dataset.packing == "concat":
            return pipe(documents, partial(concat, length=dataset.max_seq_len))
        key = None if order == "sequential" else (seed, number)
        packed = partial(pack, length=dataset.max_seq_len, key=key)
        return pipe(documents, partial(regroup, window=growing(dataset.pack_window), function=packed))

    lanes = [lane(number) for number in range(dataset.num_lanes)]
    rows_per_lane = dataset.batch_size // dataset.num_lanes
    return partial(deal, lanes, rows_per_lane=rows_per_lane, length=dataset.max_seq_len, place=place)


def open_sources(
    config: LMConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, *, by_document: bool = False
) -> list[Corpus]:
    """The sources' files, cut into blocks, with the token cache behind them if there is one."""
    opened = [
        open_corpus(
            source.path,
            tokenizer,
            name=name,
            format=None if source.format == "auto" else source.format,
            reading=Reading(source.text_key, source.separator, source.dtype),
            num_lanes=config.dataset.num_lanes,
            by_document=by_document,
        )
        for source, name in zip(sources, source_names(sources), strict=True)
    ]
    if config.dataset.cache is None:
        return opened
    folder = Path(config.dataset.cache)
    return [attrs.evolve(c, read=partial(cached, read=c.read, tokenizer=tokenizer, folder=folder)) for c in opened]


def all_corpora(config: LMConfig) -> list[Corpus]:
    """The sources of training and of validation, in the order of the numbers that stand for them in batches."""
    dataset = config.dataset
    return open_sources(config, [*dataset.sources, *dataset.valid_sources], make_tokenizer(config))


def source_list(config: LMConfig) -> list[str]:
    """The names of the sources of training and of validation, in the same order."""
    return source_names([*config.dataset.sources, *config.dataset.valid_sources])


def make_tokenizer(config: LMConfig) -> Tokenizer:
    """The tokenizer of the config.

    Raises:
        UsageError: if it has more tokens than the model has embeddings.
    """
    section, size = config.tokenizer, config.model.config.vocab_size
    if section.path is None:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = huggingface_tokenizer(section.path, section.eos_token, section.bos_token)
    if tokenizer.vocab_size > size:
        raise UsageError(f"model.config.vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {size}")
    return tokenizer


def _weights(source: DataSource) -> list[tuple[int, float]]:
    return [(0, source.weight), *source.weight_schedule]


def _shuffled(documents: Sequence[Document], index: int, *, key: tuple[int, ...]) -> list[Document]:
    return shuffled(documents, *key, index)
