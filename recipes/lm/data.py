"""The stream of the language-model recipe: which stages, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from attrs import frozen

from fnrecipe.config import DatasetSection, DataSource
from fnrecipe.data import (
    Batch,
    Place,
    Source,
    Tokenizer,
    Tokens,
    byte_tokenizer,
    chunked,
    deal,
    each,
    find_files,
    held_out,
    huggingface_tokenizer,
    keep,
    mix,
    pack,
    parse_json,
    pipe,
    plan_blocks,
    python_stdlib,
    read_files,
    read_lines,
    regroup,
    repeat,
    shuffled,
    tokenize,
)
from fnrecipe.data.pack import Row
from fnrecipe.errors import UsageError

from .config import LMConfig

Split = Callable[[str], bool]


@frozen
class Corpus:
    """Units (files, blocks of lines) that are shuffled and shared out, and how to read the documents of some of them."""

    units: Sequence[Any]
    read: Callable[[Sequence[Any]], Source[str]]
    weight: float = 1.0


def train_stream(config: LMConfig, place: Place) -> Source[Batch]:
    """The training documents, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    fraction = config.dataset.valid_fraction
    corpora = find_corpora(config.dataset, config.dataset.sources)
    split: Split = lambda text: bool(text) and not held_out(text, fraction)  # noqa: E731
    return batches(config, place, corpora, split, epochs=config.regime.num_data_epochs, seed=config.common.seed)


def valid_stream(config: LMConfig, place: Place) -> Source[Batch]:
    """The validation documents, once, in the order of their files."""
    fraction = 1.0 if config.dataset.valid_sources else config.dataset.valid_fraction
    if not fraction:
        return lambda cursor: iter(())
    corpora = find_corpora(config.dataset, config.dataset.valid_sources or config.dataset.sources)
    split: Split = lambda text: bool(text) and held_out(text, fraction)  # noqa: E731
    return batches(config, place, corpora, split, epochs=1, seed=None)


def find_corpora(dataset: DatasetSection, sources: Sequence[DataSource]) -> list[Corpus]:
    if dataset.family == "python_stdlib":
        return [Corpus(python_stdlib(), lambda paths: partial(read_files, paths=paths))]

    def read(blocks: Sequence[Any]) -> Source[str]:
        return pipe(partial(read_lines, blocks=blocks), partial(each, function=partial(parse_json, key=dataset.text_key)))

    return [Corpus(plan_blocks(find_files(s.path), dataset.num_lanes), read, s.weight) for s in sources]


def batches(
    config: LMConfig, place: Place, corpora: Sequence[Corpus], split: Split, *, epochs: int | None, seed: int | None
) -> Source[Batch]:
    """Every lane reads its units of each corpus, mixes the corpora by tokens and packs its own rows."""
    dataset, tokenizer = config.dataset, make_tokenizer(config)
    stages = (
        partial(keep, where=split),
        partial(chunked, size=16, function=partial(tokenize, tokenizer=tokenizer)),
    )

    def documents(corpus: Corpus, lane: int, epoch: int) -> Source[str]:
        if seed is None:
            return corpus.read(corpus.units[lane :: dataset.num_lanes])
        mine = shuffled(corpus.units, seed)[lane :: dataset.num_lanes]
        return corpus.read(shuffled(mine, seed, lane, epoch))

    def tokens(corpus: Corpus, lane: int) -> Source[Tokens]:
        return partial(repeat, lambda epoch: pipe(documents(corpus, lane, epoch), *stages), epochs=epochs)

    def lane(number: int) -> Source[Row]:
        mixed = partial(
            mix,
            [tokens(corpus, number) for corpus in corpora],
            weights=[corpus.weight for corpus in corpora],
            size=lambda document: len(document.ids),
        )
        packed = partial(pack, length=dataset.max_seq_len, key=(config.common.seed, number))
        return pipe(mixed, partial(regroup, window=dataset.pack_window, function=packed))

    lanes = [lane(number) for number in range(dataset.num_lanes)]
    rows_per_lane = dataset.batch_size // dataset.num_lanes
    return partial(deal, lanes, rows_per_lane=rows_per_lane, length=dataset.max_seq_len, place=place)


def make_tokenizer(config: LMConfig) -> Tokenizer:
    """The tokenizer of the config.

    Raises:
        UsageError: if it has more tokens than the model has embeddings.
    """
    section, size = config.tokenizer, config.model.config.vocab_size
    tokenizer = byte_tokenizer() if section.path is None else huggingface_tokenizer(section.path, section.eos_token)
    if tokenizer.vocab_size > size:
        raise UsageError(f"model.config.vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {size}")
    return tokenizer
