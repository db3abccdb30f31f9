"""The records of a config with the log-probabilities of their answers under the reference model beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TypeAlias

import attrs
import torch

from fnrecipe import presets, random, streams, tree
from fnrecipe.data import Cursor, Document, Source, Stream, Tokens, map_windows, pipe, read_blocks, tolerate
from fnrecipe.data.document import Read
from fnrecipe.data.encode_examples import Encoding, leave_out
from fnrecipe.data.encode_preferences import judged
from fnrecipe.data.judged import Judged
from fnrecipe.data.pack import Row
from fnrecipe.data.preferences import SCORES
from fnrecipe.errors import DataError, UsageError
from fnrecipe.models.answers import answer_sums
from fnrecipe.parallel.mesh import replicated

from .config import PreferenceConfig
from .data import form, make_encoding, make_template
from .reference import reference

Record: TypeAlias = Mapping[str, object]
Sums: TypeAlias = Callable[[Sequence[Row]], Sequence[Sequence[float]]]
"""Rows -> the log-probabilities of the answers of each under the reference model, slot by slot."""


@attrs.frozen(eq=False)
class Recorded(Judged):
    """The two answers of a record, its JSON object as text, and its number in the source."""

    record: str = attrs.field(kw_only=True)
    number: int = attrs.field(kw_only=True)


def score(config: PreferenceConfig, device: torch.device) -> Iterator[Record]:
    """The records of `dataset.sources`, source by source, each as it is but for its two log-probabilities.

    Raises:
        UsageError: if the config has no reference model, or its criterion is not of pairs.
        DataError: for a record that is no pair.
    """
    if not (config.has_reference and config.in_pairs):
        found = "reference.precomputed=true" if config.reference.precomputed else f"criterion.name={config.criterion.name}"
        raise UsageError(f"score: expected a criterion of pairs with its reference model, as dpo has, found {found}")
    dataset, tokenizer = config.dataset, streams.make_tokenizer(config)
    encoding = make_encoding(config, tokenizer, make_template(config))
    corpora = streams.open_sources(config, dataset.sources, tokenizer)
    scored = partial(_scored, config=config, sums=_sums(config, device))
    for corpus in corpora:
        records = pipe(
            partial(read_blocks, blocks=corpus.blocks, read=corpus.read),
            partial(_recorded, encoding=encoding),
            partial(tolerate, limit=dataset.max_bad_records),
            partial(leave_out, length=dataset.max_seq_len, name=corpus.name),
            partial(map_windows, window=dataset.pack_window, function=scored),
        )
        yield from (record for record, _ in records(None))


def _sums(config: PreferenceConfig, device: torch.device) -> Sums:
    dataset, collate = config.dataset, partial(form(config).collate, length=config.dataset.max_seq_len)
    apply = presets.apply(config.model, config.trainer, dataset.attention, dataset.documents_per_row)
    params = reference(config, random.fold_in(random.key(config.common.seed, device), "init"), replicated)

    def sums(rows: Sequence[Row]) -> Sequence[Sequence[float]]:
        batch = tree.map(lambda tensor: tensor.to(device), tree.from_numpy(collate(rows)))
        with torch.no_grad():
            found: Sequence[Sequence[float]] = answer_sums(apply, params, batch).tolist()
        return found

    return sums


def _recorded(source: Source[Read], cursor: Cursor = None, *, encoding: Encoding) -> Stream[Recorded | DataError]:
    for number, (item, cursor) in enumerate(source(cursor)):
        yield (item if isinstance(item, DataError) else _record(item, encoding, number)), cursor


def _record(document: Document, encoding: Encoding, number: int) -> Recorded | DataError:
    found = judged(document, encoding, pairs=True)
    if isinstance(found, DataError):
        return found
    return Recorded(**attrs.asdict(found, recurse=False), record=document.text or "", number=number)


def _scored(window: Sequence[Tokens], index: int, *, config: PreferenceConfig, sums: Sums) -> list[Record]:
    """The records of a window, in its order; as many rows at a time as a microbatch has."""
    dataset, size = config.dataset, config.dataset.batch_size // config.gang.num_microbatches
    rows = form(config).pack(window, index, length=dataset.max_seq_len, limit=dataset.documents_per_row, key=None)
    found: list[tuple[Tokens, Sequence[float]]] = []
    for start in range(0, len(rows), size):
        for row, values in zip(rows[start : start + size], sums(rows[start : start + size]), strict=True):
            found += [(item, values[2 * place : 2 * place + 2]) for place, item in enumerate(row)]
    return [record for _, record in sorted((_with_scores(item, *scores) for item, scores in found), key=itemgetter(0))]


def _with_scores(item: Tokens, chosen: float, rejected: float) -> tuple[int, Record]:
    """The record's number, and the record with scores of fairseq2's names in the place of any that it had."""
    assert isinstance(item, Recorded)
    record: Record = json.loads(item.record)
    (names, *_) = SCORES.items()
    kept = {key: value for key, value in record.items() if key not in {*SCORES, *SCORES.values()}}
    return item.number, {**kept, **dict(zip(names, (chosen, rejected), strict=True))}
