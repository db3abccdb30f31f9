from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fnrecipe.config import DataSource, TokenizerSection
from fnrecipe.data import Batch, LaneAssignment
from fnrecipe.errors import DataError, UsageError
from fnrecipe.recipes.lm.data import train_stream
from tests.data.laws import check_resumes, items
from tests.recipes.streams import (
    DOCUMENTS,
    END,
    ONE_A_ROW,
    documents_of,
    expected_pieces,
    in_order,
    lines,
    pieces,
    recipe,
    texts,
    token_counts,
    train,
    write,
)

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    from backports import zstd

Write = Callable[[Path, Sequence[str]], DataSource]
SEPARATOR = "\n\n-- 文 --\n"


def halves(documents: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    return [("first", documents[:23]), ("second", documents[23:])]


def as_jsonl(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        write(folder / f"{name}.jsonl", some)
    return DataSource(str(folder))


def as_gzip(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(some).encode()))
    return DataSource(str(folder))


def as_zstd(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        (folder / f"{name}.jsonl.zst").write_bytes(zstd.compress(lines(some).encode()))
    return DataSource(str(folder))


def as_parquet(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        table = pyarrow.table({"id": list(range(len(some))), "body": list(some)})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=10)
    return DataSource(str(folder), text_key="body")


def as_separated_text(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        (folder / f"{name}.txt").write_text(SEPARATOR.join(some), encoding="utf-8")
    return DataSource(str(folder), separator=SEPARATOR)


def as_text_files(folder: Path, documents: Sequence[str]) -> DataSource:
    for number, text in enumerate(documents):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return DataSource(str(folder))


def as_tokens(folder: Path, documents: Sequence[str]) -> DataSource:
    for name, some in halves(documents):
        np.save(folder / f"{name}.npy", np.array([i for text in some for i in (*text.encode(), END)], np.uint16))
    return DataSource(str(folder))


ENTERED: list[Write] = [as_jsonl, as_separated_text, as_text_files, as_tokens]
CLOSED: list[Write] = [as_gzip, as_zstd, as_parquet]


@pytest.mark.parametrize("order", ["blocks", "documents", "sequential"])
@pytest.mark.parametrize("form", [*ENTERED, *CLOSED])
def test_every_format_gives_every_prediction_of_an_epoch_once(tmp_path: Path, form: Write, order: str) -> None:
    source = form(tmp_path, DOCUMENTS)
    if form in CLOSED and order == "documents":
        with pytest.raises(UsageError, match=r"first\.(jsonl|parquet).*order=documents.*use order=blocks"):
            train(recipe(source, order=order))
        return
    found = Counter(pieces(items(train(recipe(source, epochs=2, order=order, num_lanes=8, batch_size=8)))))
    assert found == Counter({piece: 2 * count for piece, count in expected_pieces(DOCUMENTS).items()})


@pytest.mark.parametrize("form", [*ENTERED, *CLOSED])
def test_every_format_resumes(tmp_path: Path, form: Write) -> None:
    source = train(recipe(form(tmp_path, DOCUMENTS), epochs=2, num_lanes=4, shuffle_window=7))
    assert check_resumes(source, limit=30) > 10


def flat_lanes(batches: Sequence[Batch], rows_per_lane: int) -> list[list[int]]:
    """The tokens of each lane's rows end to end, where documents end with END and begin with none.

    A row begins anew after a document that ends with a row, else with the last target of the row before.
    """
    lanes = []
    for first in range(0, len(batches[0].mask), rows_per_lane):
        flat: list[int] = []
        for batch in batches:
            for row in range(first, first + rows_per_lane):
                tokens, targets = (ids[row][batch.mask[row]].tolist() for ids in (batch.tokens, batch.targets))
                if tokens:
                    assert tokens[1:] == targets[:-1]
                    goes_on = bool(flat) and flat[-1] != END
                    assert not goes_on or flat[-1] == tokens[0]
                    flat += [*tokens[goes_on:], targets[-1]]
        lanes.append(flat)
    return lanes


@pytest.mark.parametrize("order", ["blocks", "documents", "sequential"])
@pytest.mark.parametrize("form", ENTERED)
def test_concat_gives_every_prediction_but_those_at_the_ends_of_rows(tmp_path: Path, form: Write, order: str) -> None:
    ends = TokenizerSection(add_bos=False)
    config = recipe(form(tmp_path, DOCUMENTS), packing="concat", order=order, epochs=2, ends=ends, num_readers=2)
    lanes = flat_lanes(items(train(config)), 2)
    assert all(flat[-1] == END for flat in lanes)
    found = [text for flat in lanes for text in bytes(i if i < END else 0 for i in flat[:-1]).decode().split("\0")]
    assert Counter(found) == Counter(DOCUMENTS * 2)


def letters(folder: Path, name: str, count: int) -> str:
    """A file of documents of one letter, of 1 to 60 bytes."""
    return write(folder / f"{name}.jsonl", [name * (1 + 17 * i % 60) for i in range(count)]).path


MIXED: dict[str, Any] = {"max_seq_len": 64, "batch_size": 2, "num_lanes": 2, "num_readers": 2, "pack_window": 1}
LARGEST = 62


def test_sources_get_their_shares_of_the_tokens(tmp_path: Path) -> None:
    a, b = (letters(tmp_path, name, 80) for name in "ab")
    shares = recipe(DataSource(a, weight=0.7), DataSource(b, weight=0.3), epochs=None, **MIXED)
    batches = [batch for batch, _ in islice(train(shares)(None), 150)]
    for counts in token_counts(batches, 2, "ab"):
        assert all(abs(used["a"] - 0.7 * used.total()) <= LARGEST for used in counts)
        assert counts[-1].total() > 2000


def test_sources_follow_the_schedule_of_their_weights(tmp_path: Path) -> None:
    """a's weight falls from 1 to 0 over 8000 tokens of two lanes, b's rises: of a lane's first t a has t - t² / 8000."""
    a, b = (letters(tmp_path, name, 80) for name in "ab")
    falling = DataSource(a, weight=1, weight_schedule=((8000, 0),))
    rising = DataSource(b, weight=0, weight_schedule=((8000, 1),))
    batches = [batch for batch, _ in islice(train(recipe(falling, rising, epochs=None, **MIXED))(None), 250)]
    for counts in token_counts(batches, 2, "ab"):
        for used in counts:
            t = min(used.total(), 4000)
            assert abs(used["a"] - (t - t * t / 8000)) <= 2 * LARGEST
        assert counts[-1].total() > 6000
        assert counts[-1]["b"] > 2 * counts[-1]["a"]


def test_a_stream_resumes_in_the_middle_of_a_schedule(tmp_path: Path) -> None:
    falling = DataSource(letters(tmp_path, "a", 40), weight_schedule=((1000, 0.1), (2000, 2)))
    source = train(recipe(falling, DataSource(letters(tmp_path, "b", 40), weight=0.5), epochs=None, **MIXED))
    assert check_resumes(source, limit=40) == 40


def test_a_dropped_source_leaves_the_others(tmp_path: Path) -> None:
    long, short = write(tmp_path / "long.jsonl", DOCUMENTS), write(tmp_path / "short.jsonl", texts(100, 103))
    found = Counter(pieces(items(train(recipe(long, short, finished_source="drop", epochs=2)))))
    assert found == Counter({piece: 2 * count for piece, count in expected_pieces(DOCUMENTS + texts(100, 103)).items()})


@pytest.mark.parametrize("finished", ["repeat", "stop"])
def test_finished_sources_keep_their_share_to_the_end(tmp_path: Path, finished: str) -> None:
    """`a` of 90 documents and `b` of 30 at equal shares: with repeat `b` is read three times, with stop a third of `a`."""
    both = [DataSource(letters(tmp_path, name, count)) for name, count in {"a": 90, "b": 30}.items()]
    batches = items(train(recipe(*both, finished_source=finished, **MIXED)))
    last = []
    for counts in token_counts(batches, 2, "ab"):
        assert all(abs(used["a"] - used.total() / 2) <= LARGEST for used in counts)
        last.append(counts[-1])
    found, once = Counter(documents_of(batches)), Counter(name * (1 + 17 * i % 60) for name in "ab" for i in range(30))
    if finished == "repeat":
        assert {text: count for text, count in found.items() if "a" in text} == Counter(
            "a" * (1 + 17 * i % 60) for i in range(90)
        )
        assert all(count > 1 for text, count in found.items() if "b" in text)
    else:
        assert all(found[text] <= 1 for text in once if "b" in text)
        assert sum(found[text] for text in once if "b" in text) > 20
        assert 0 < sum(used["a"] for used in last) < 0.6 * sum(3 + 17 * i % 60 for i in range(90))


def test_stop_ends_a_lane_with_its_first_finished_source(tmp_path: Path) -> None:
    one_lane = {**ONE_A_ROW, "finished_source": "stop"}
    long, short = (DataSource(letters(tmp_path, name, count)) for name, count in {"a": 90, "b": 30}.items())
    found = in_order(recipe(long, short, **one_lane))
    assert sorted(text for text in found if "b" in text) == sorted("b" * (1 + 17 * i % 60) for i in range(30))
    assert (
        abs(sum(len(text) + 2 for text in found if "a" in text) - sum(len(text) + 2 for text in found if "b" in text))
        <= LARGEST
    )


BAD = {3: "{", 12: "1", 20: '{"text": 5}', 21: "[]", 41: '{"txt": "?"}', 57: '{"text": "'}


def write_bad(path: Path) -> DataSource:
    """The documents, with bad lines among them, which are numbered from 1."""
    found = [json.dumps({"text": text}) for text in DOCUMENTS]
    for number, line in BAD.items():
        found.insert(number - 1, line)
    path.write_text("\n".join(found), encoding="utf-8")
    return DataSource(str(path))


def bad_lines(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(record.getMessage().split(".jsonl:")[1].split()[0]) for record in caplog.records]


@pytest.mark.parametrize("order", ["blocks", "documents", "sequential"])
def test_bad_records_are_skipped_with_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture, order: str) -> None:
    source = write_bad(tmp_path / "bad.jsonl")
    with caplog.at_level(logging.WARNING):
        found = Counter(pieces(items(train(recipe(source, max_bad_records=len(BAD), order=order)))))
    assert found == expected_pieces(DOCUMENTS)
    assert sorted(bad_lines(caplog)) == sorted(BAD)
    assert all(f"{tmp_path}/bad.jsonl:" in record.getMessage() for record in caplog.records)


def test_good_documents_keep_their_order_around_bad_records(tmp_path: Path) -> None:
    one_lane = {**ONE_A_ROW, "order": "sequential", "max_bad_records": len(BAD)}
    assert in_order(recipe(write_bad(tmp_path / "bad.jsonl"), **one_lane)) == DOCUMENTS


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_bad_record_beyond_the_limit_ends_the_stream(tmp_path: Path, limit: int) -> None:
    source = write_bad(tmp_path / "bad.jsonl")
    line = list(BAD)[limit]
    with pytest.raises(DataError, match=rf"bad\.jsonl:{line} \(byte \d+\): expected ") as caught:
        items(train(recipe(source, max_bad_records=limit, order="sequential", **ONE_A_ROW)))
    assert (f"bad records skipped before it: {limit}" in str(caught.value)) == (limit > 0)


def test_the_limit_of_bad_records_is_for_each_reader_and_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_bad(tmp_path / "bad.jsonl")
    readers = []
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            caplog.clear()
            for _ in islice(
                train_stream(recipe(source, num_readers=2, max_bad_records=len(BAD)), LaneAssignment(rank, 2))(None), 60
            ):
                pass
            readers.append(sum("bad record" in record.getMessage() for record in caplog.records))
    assert sum(readers) == len(BAD)
    assert min(readers) > 0
    found = items(train(recipe(source, num_readers=2, max_bad_records=max(readers), epochs=3)))
    assert Counter(pieces(found)) == Counter({piece: 3 * count for piece, count in expected_pieces(DOCUMENTS).items()})
    with pytest.raises(DataError):
        items(train(recipe(source, num_readers=2, max_bad_records=max(readers) - 1)))


def test_bad_records_are_not_counted_twice_by_resuming(tmp_path: Path) -> None:
    source = write_bad(tmp_path / "bad.jsonl")
    assert check_resumes(train(recipe(source, max_bad_records=len(BAD), order="sequential", num_lanes=1)), limit=40) > 15
