"""The stream of preference optimization: records become answers with verdicts, the two of a pair in the same row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import attrs

from fnrecipe import streams
from fnrecipe.data import Batch, Corpus, Document, LaneAssignment, Source, Stage, Tokenizer, sift, tolerate
from fnrecipe.data.chat_template import ChatTemplate
from fnrecipe.data.document import Read
from fnrecipe.data.encode_examples import Encoding, find_template, leave_out, marked
from fnrecipe.data.encode_preferences import encode_preferences, read_judged
from fnrecipe.data.judged import collate_judged, pack_judged
from fnrecipe.streams import Form, Part, Split

from .config import PreferenceConfig


def train_stream(config: PreferenceConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The training preferences, in an order of its own for each epoch; without end unless `num_data_epochs` says so."""
    return streams.train_stream(config, assignment, partial(stages, template=make_template(config)), form(config))


def train_documents(config: PreferenceConfig, assignment: LaneAssignment) -> Source[Sequence[str]]:
    """Where the preferences of each batch of `train_stream` are."""
    return streams.train_documents(config, assignment, partial(stages, template=make_template(config)), form(config))


def valid_stream(config: PreferenceConfig, assignment: LaneAssignment) -> Source[Batch]:
    """The validation preferences, once, in a random order that stays."""
    return streams.valid_stream(config, assignment, partial(stages, template=make_template(config)), form(config))


def example(config: PreferenceConfig, rows: int) -> Batch:
    """A batch of rows of padding."""
    return streams.example(config, rows, form(config))


def form(config: PreferenceConfig) -> Form:
    """Rows of pairs, or of answers and, for an estimate, answers to other prompts."""
    slots = config.dataset.documents_per_row // 2 * 2
    return Form(partial(pack_judged, unrelated=not config.in_pairs), partial(collate_judged, slots=slots))


def stages(
    config: PreferenceConfig, tokenizer: Tokenizer, part: Part, split: Split, template: ChatTemplate | None
) -> Sequence[Stage]:
    dataset, encoding = config.dataset, make_encoding(config, tokenizer, template)
    judged = partial(encode_preferences, encoding=encoding, pairs=config.in_pairs, scored=config.reference.precomputed)
    return [
        partial(sift, reason=partial(_left_out, split=split), name=part.name),
        *part.shuffle,
        partial(judged, number=part.number, epoch=part.epoch),
        partial(tolerate, limit=dataset.max_bad_records),
        partial(leave_out, length=dataset.max_seq_len, name=part.name),
    ]


def make_encoding(config: PreferenceConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> Encoding:
    dataset, ends = config.dataset, config.tokenizer
    return Encoding(tokenizer, template, True, ends.add_bos, ends.add_eos, dataset.max_seq_len, dataset.too_long)


def make_template(config: PreferenceConfig) -> ChatTemplate | None:
    """The chat template that the config names, or the one beside the tokenizer; None if there is none."""
    return find_template(config.dataset.chat_template, config.tokenizer.path)


def make_tokenizer(config: PreferenceConfig) -> Tokenizer:
    """The tokenizer, which counts as another one with another template."""
    return marked(streams.make_tokenizer(config), make_template(config), "last")


def all_corpora(config: PreferenceConfig) -> list[Corpus]:
    """The sources of training and of validation, with the tokens of their answers."""
    encoding = make_encoding(config, streams.make_tokenizer(config), make_template(config))
    read = partial(read_judged, encoding=encoding, pairs=config.in_pairs)
    return [attrs.evolve(c, read=partial(read, c.read)) for c in streams.all_corpora(config)]


def _left_out(item: Read, *, split: Split) -> str:
    return split(item) if isinstance(item, Document) else ""
