"""What a corpus holds, in numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.batch import Batch
from fnrecipe.data.blocks import Block
from fnrecipe.data.corpus import Corpus
from fnrecipe.data.document import Document
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.data.tokenizer import Tokenizer, tokenize
from fnrecipe.errors import DataError

NO_ROW = (
    "dataset: expected at least one row, found none: each document is empty, bad, on the other side of the split "
    "(dataset.valid_fraction), or of fewer tokens than it takes to predict one"
)
_CHUNK = 256
_WATCHED, _PADDING = (8, 64, 512), 0.2
_log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Survey:
    """Documents in numbers.

    lengths    in tokens, without special ones: int64 [documents]
    num_bytes  bytes of text that the tokens stand for
    lost       bytes of text that no token stands for
    bad        the bad records
    """

    lengths: NDArray[np.int64]
    num_bytes: int
    lost: int
    bad: Sequence[DataError]


@attrs.frozen
class Fill:
    """How full rows are: positions in all, those with a token, those with a target that is trained, pieces, rows."""

    positions: int
    tokens: int
    targets: int
    pieces: int
    rows: int


def survey(corpus: Corpus, tokenizer: Tokenizer, limit: int | None = None) -> Survey:
    """Counts the first `limit` documents of a corpus; empty ones are none."""
    items = (item for block in corpus.blocks for item in corpus.read(block) if item or isinstance(item, DataError))
    lengths, num_bytes, lost, bad = [np.zeros(0, np.int64)], 0, 0, []
    while chunk := list(islice(items, _CHUNK if limit is None else min(_CHUNK, limit - sum(map(len, lengths))))):
        documents = [item for item in chunk if isinstance(item, Document)]
        bad += [item for item in chunk if isinstance(item, DataError)]
        found = tokenize(documents, tokenizer=tokenizer, add_eos=False)
        lengths.append(np.array([len(tokens.ids) - 1 for tokens in found], np.int64))
        num_bytes += sum(tokens.num_bytes for tokens in found)
        lost += sum(tokens.lost for tokens in found)
    return Survey(np.concatenate(lengths), num_bytes, lost, bad)


def fill(batches: Iterator[Batch]) -> Fill:
    """Adds up the rows of batches."""
    found = np.zeros(5, np.int64)
    for batch in batches:
        used = (batch.segments >= 0).sum()
        found += (batch.mask.size, used, batch.mask.sum(), (batch.segments.max(1) + 1).sum(), len(batch.mask))
    return Fill(*found.tolist())


def watch_padding(source: Source[Batch], cursor: Cursor = None) -> Stream[Batch]:
    """The same batches; a warning, once, if more than a fifth of the first 8, 64 or 512 of them, or of all, is padding."""
    positions = tokens = told = 0
    for count, (batch, cursor) in enumerate(source(cursor), 1):
        positions, tokens = positions + batch.mask.size, tokens + int((batch.segments >= 0).sum())
        if count in _WATCHED and not told:
            told = _tell_padding(1 - tokens / positions, count)
        yield batch, cursor
    if positions and not told:
        _tell_padding(1 - tokens / positions, count)


def _tell_padding(share: float, count: int) -> bool:
    if share > _PADDING:
        advice = (
            "rows of fewer tokens (dataset.max_seq_len), more documents in a row (dataset.max_documents_per_row), "
            "fewer rows or more documents hold less"
        )
        once = {"once": "padding"}  # of several workers, one tells it
        _log.warning("%.0f %% of the positions of the first %d batches are padding; %s", 100 * share, count, advice, extra=once)
    return share > _PADDING


def read_through(corpus: Corpus) -> Iterator[tuple[Block, int]]:
    """Every block and how many documents it holds, for the sake of what reading them leaves in a cache."""
    for block in corpus.blocks:
        yield block, sum(isinstance(item, Document) for item in corpus.read(block))
