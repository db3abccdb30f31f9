"""The stream of the language-model recipe: what becomes of documents, in which order, before they are packed into rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fnrecipe import streams
from fnrecipe.data import Batch, LaneAssignment, Source, Stage, Tokenizer, Tokens, sift, tokenized, tolerate
from fnrecipe.streams import Part, Split

from .config import LMConfig


def train_stream(config: LMConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The training documents, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    return streams.train_stream(config, assignment, stages)


def train_documents(config: LMConfig, assignment: LaneAssignment) -> Source[Sequence[str]]:
    """Where the documents of each batch of `train_stream` are."""
    return streams.train_documents(config, assignment, stages)


def valid_stream(config: LMConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The validation documents, once, in a random order that stays: the first batches are a fair sample of all."""
    return streams.valid_stream(config, assignment, stages)


def stages(config: LMConfig, tokenizer: Tokenizer, part: Part, split: Split) -> Sequence[Stage]:
    dataset, ends = config.dataset, config.tokenizer
    least = 1 if dataset.packing == "concat" else 2  # alone in a row, a document of one token has no prediction
    encode = partial(tokenized, tokenizer=tokenizer, add_bos=ends.add_bos, add_eos=ends.add_eos)
    return [
        partial(tolerate, limit=dataset.max_bad_records),
        partial(sift, reason=split, name=part.name),
        *part.shuffle,
        partial(encode, name=part.source, number=part.number, epoch=part.epoch),
        partial(sift, reason=partial(_too_short, least=least), name=part.name, needed=False),
    ]


def _too_short(document: Tokens, *, least: int) -> str:
    return "" if len(document.ids) >= least else f"of fewer than {least} tokens"
