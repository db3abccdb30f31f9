"""The data: sources, what becomes of them, and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.converters import optional

from fnrecipe.config.affects import RUNTIME
from fnrecipe.config.bounds import NonNegative, NonNegativeInt, PositiveInt, ProperFraction
from fnrecipe.config.paths import expanded
from fnrecipe.errors import Problem, redacted


@frozen
class DataSource:
    """A file, a directory, a glob or an address, or `stdlib:` for the sources of Python's library; and its share of the tokens.

    `format`: a name of those that the recipe knows (`fnrecipe.data.FORMATS`), which checks it; `auto`: by the suffix.
    `weight_schedule`: points (tokens trained on, weight) that follow `weight`, joined by straight lines.
    In a config, its path alone may stand for a source, and a source alone for a list of one.
    """

    PLAIN_TEXT: ClassVar[str] = "path"

    path: str = field(converter=expanded)
    name: str | None = None
    format: str = "auto"
    text_key: str = "text"
    separator: str | None = None
    dtype: Literal["uint16", "uint32"] = "uint16"
    weight: NonNegative = 1.0
    weight_schedule: tuple[tuple[NonNegativeInt, NonNegative], ...] = ()

    def conflicts(self) -> Iterator[Problem]:
        steps = [0, *(tokens for tokens, _ in self.weight_schedule)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            yield Problem("weight_schedule", "numbers of tokens above 0 that increase", str(steps[1:]))
        if self.weight == 0 and not any(weight for _, weight in self.weight_schedule):
            yield Problem("weight", "a number above 0, at least later in weight_schedule", "0")
        if not self.path:
            yield Problem("path", "a file, a directory, a glob or an address", "''")
        if self.separator == "":
            yield Problem("separator", "text, or null for one document a file", "''")


@frozen
class DatasetSection:
    """`max_documents_per_row`: packing keeps to it, as a GPU's kernels want a bound; null: max_seq_len / 128, at least 8."""

    sources: tuple[DataSource, ...] = (DataSource("stdlib:"),)
    valid_sources: tuple[DataSource, ...] = ()
    valid_fraction: ProperFraction = 0.05
    max_bad_records: NonNegativeInt = 0
    max_record_bytes: PositiveInt = 64 << 20
    order: Literal["blocks", "documents", "sequential"] = "blocks"
    shuffle_window: PositiveInt = 256
    finished_source: Literal["drop", "repeat", "stop"] = "drop"
    packing: Literal["best_fit", "concat"] = "best_fit"
    pack_window: PositiveInt = 512
    max_seq_len: PositiveInt = 1024
    max_documents_per_row: PositiveInt | None = None
    attention: Literal["document", "row"] = "document"
    batch_size: PositiveInt = 8
    num_lanes: PositiveInt = 8
    num_readers: PositiveInt | None = None
    num_workers: NonNegativeInt = field(default=0, metadata=RUNTIME)
    prefetch: NonNegativeInt = field(default=2, metadata=RUNTIME)
    cache: str | None = field(default=None, converter=optional(expanded), metadata=RUNTIME)

    @property
    def documents_per_row(self) -> int:
        return self.max_documents_per_row or max(8, self.max_seq_len // 128)

    def conflicts(self) -> Iterator[Problem]:
        if not self.sources:
            yield Problem("sources", "at least one source", "none")
        if self.valid_sources and self.valid_fraction > 0:
            yield Problem("valid_fraction", "0 where dataset.valid_sources is given", str(self.valid_fraction))
        if self.batch_size % self.num_lanes:
            yield Problem("batch_size", f"a multiple of dataset.num_lanes = {self.num_lanes}", str(self.batch_size))
        if self.num_workers and self.num_lanes % self.num_workers:
            yield Problem("num_workers", f"a divisor of dataset.num_lanes = {self.num_lanes}", str(self.num_workers))
        if self.num_readers and self.num_lanes % self.num_readers:
            yield Problem("num_readers", f"a divisor of dataset.num_lanes = {self.num_lanes}", str(self.num_readers))
        if self.order == "documents" and self.cache is not None:
            yield Problem("cache", "null for dataset.order=documents: the cache keeps blocks", repr(self.cache))
        if self.sources and not any(source.weight for source in self.sources):
            yield Problem("sources", "a source whose weight is above 0 from the start", "none")
        if self.sources and not any([source.weight, *(w for _, w in source.weight_schedule)][-1] for source in self.sources):
            yield Problem("sources", "a source whose weight is above 0 at the end", "none")
        names = source_names((*self.sources, *self.valid_sources))
        if len(set(names)) < len(names):
            yield Problem("sources", "a `name` of its own for each source of training and validation", ", ".join(names))


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """What sources are called in metrics: their `name`, or the last part of their path without its suffix."""
    paths = [redacted(source.path) for source in sources]
    last = [path.rstrip("/:").rsplit("/", 1)[-1].split(".")[0] for path in paths]
    return [source.name or name or path for source, name, path in zip(sources, last, paths, strict=True)]


@frozen
class AnswersSection(DatasetSection):
    """Data of which answers are trained: they are shorter than other documents, and so rows hold more of them.

    `chat_template`: a file of Jinja, a `tokenizer_config.json`, or a directory; null: that beside the tokenizer.
    `max_documents_per_row`: null: max_seq_len / 32, at least 16.
    """

    chat_template: str | None = field(default=None, converter=optional(expanded))

    @property
    def documents_per_row(self) -> int:
        return self.max_documents_per_row or max(16, self.max_seq_len // 32)


@frozen
class TokenizerSection:
    """`byte`: one token a byte. The others read `path`, a file or a directory that holds it.

    `hf`: a Hugging Face `tokenizer.json`. `sentencepiece`: a `.model`. `tiktoken`: a rank file; `pattern` names how text is cut
    before BPE, `special_tokens` those that follow the ranks; without any, they are those of the pattern's own vocabulary.
    """

    family: Literal["byte", "hf", "sentencepiece", "tiktoken"] = "byte"
    path: str | None = field(default=None, converter=optional(expanded))
    pattern: Literal["gpt2", "cl100k", "o200k", "llama3", "qwen2"] | None = None
    special_tokens: tuple[str, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = True
    add_eos: bool = True

    def conflicts(self) -> Iterator[Problem]:
        files = {"hf": "a tokenizer.json", "sentencepiece": "a SentencePiece model", "tiktoken": "a rank file"}
        if self.family in files and self.path is None:
            yield Problem("path", f"the path of {files[self.family]} for tokenizer.family={self.family}", "null")
        if self.family == "byte":
            for name in ("path", "bos_token", "eos_token"):
                if getattr(self, name) is not None:
                    yield Problem(name, "null for tokenizer.family=byte", repr(getattr(self, name)))
        if self.family == "tiktoken" and self.pattern is None:
            yield Problem("pattern", "how a rank file's text is cut before BPE, for tokenizer.family=tiktoken", "null")
        if self.family != "tiktoken" and self.pattern is not None:
            yield Problem("pattern", f"null for tokenizer.family={self.family}", repr(self.pattern))
        if self.family != "tiktoken" and self.special_tokens:
            yield Problem("special_tokens", f"none for tokenizer.family={self.family}", ", ".join(self.special_tokens))
