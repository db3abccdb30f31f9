"""The stream of supervised fine-tuning: records become examples with a mask of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import attrs

from fnrecipe import streams
from fnrecipe.data import Batch, Corpus, Document, LaneAssignment, Source, Stage, Tokenizer, sift, tolerate
from fnrecipe.data.chat_template import ChatTemplate
from fnrecipe.data.document import Read
from fnrecipe.data.encode_examples import Encoding, encode_examples, find_template, leave_out, marked, read_encoded
from fnrecipe.streams import Part, Split

from .config import SFTConfig


def train_stream(config: SFTConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The training examples, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    return streams.train_stream(config, assignment, partial(stages, template=make_template(config)))


def train_documents(config: SFTConfig, assignment: LaneAssignment) -> Source[Sequence[str]]:
    """Where the examples of each batch of `train_stream` are."""
    return streams.train_documents(config, assignment, partial(stages, template=make_template(config)))


def valid_stream(config: SFTConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The validation examples, once, in a random order that stays."""
    return streams.valid_stream(config, assignment, partial(stages, template=make_template(config)))


def stages(config: SFTConfig, tokenizer: Tokenizer, part: Part, split: Split, template: ChatTemplate | None) -> Sequence[Stage]:
    dataset, encoding = config.dataset, make_encoding(config, tokenizer, template)
    return [
        partial(sift, reason=partial(_left_out, split=split), name=part.name),
        *part.shuffle,
        partial(encode_examples, encoding=encoding, number=part.number, epoch=part.epoch),
        partial(tolerate, limit=dataset.max_bad_records),
        partial(leave_out, length=dataset.max_seq_len, name=part.name),
    ]


def make_encoding(config: SFTConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> Encoding:
    dataset, ends = config.dataset, config.tokenizer
    last = dataset.train_on == "last"
    return Encoding(tokenizer, template, last, ends.add_bos, ends.add_eos, dataset.max_seq_len, dataset.too_long)


def make_template(config: SFTConfig) -> ChatTemplate | None:
    """The chat template that the config names, or the one beside the tokenizer; None if there is none."""
    return find_template(config.dataset.chat_template, config.tokenizer.path)


def make_tokenizer(config: SFTConfig) -> Tokenizer:
    """The tokenizer, which counts as another one with another template, or other answers to train on."""
    return marked(streams.make_tokenizer(config), make_template(config), config.dataset.train_on)


def all_corpora(config: SFTConfig) -> list[Corpus]:
    """The sources of training and of validation, with the tokens of their examples."""
    encoding = make_encoding(config, streams.make_tokenizer(config), make_template(config))
    return [attrs.evolve(c, read=partial(read_encoded, c.read, encoding=encoding)) for c in streams.all_corpora(config)]


def _left_out(item: Read, *, split: Split) -> str:
    return split(item) if isinstance(item, Document) else ""
