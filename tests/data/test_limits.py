"""Records that are too long are bad records, and are never in memory, whatever they are packed in."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, Document, Reading, byte_tokenizer, open_corpus, read_blocks
from fnrecipe.data import records as module
from fnrecipe.data.blocks import cut, share
from fnrecipe.data.document import Read
from fnrecipe.data.formats import jsonl, parquet, text
from fnrecipe.data.records import WHOLE, Record, read_records, read_whole
from fnrecipe.errors import DataError
from tests.data.laws import check_resumes

LIMIT = 1 << 20
TOO_LONG = "expected a record of at most 1,048,576 bytes (dataset.max_record_bytes), found more"


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a": bytes,
    "a.gz": gzip.compress,
    "a.bz2": bz2.compress,
    "a.xz": partial(lzma.compress, preset=0),
    "a.zst": zstd,
}
PIECES = st.lists(st.sampled_from([b"\n", b"a", b"bcd ", b"  \t  ", b"x" * 9]), max_size=20).map(b"".join)


def shown(item: Record | DataError) -> tuple[int, bytes | None]:
    """Where a record starts, and what it is, None if it is too long."""
    if isinstance(item, Record):
        return item.offset, item.data
    return int(str(item).partition("(byte ")[2].partition(")")[0]), None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits") / "records"


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@given(content=PIECES, limit=st.integers(1, 12), cuts=st.lists(st.integers(0, 60), max_size=6), stripes=st.integers(1, 3))
def test_records_of_more_than_the_limit_are_errors_whatever_the_cuts(
    scratch: Path, chunk: int, content: bytes, limit: int, cuts: list[int], stripes: int
) -> None:
    scratch.write_bytes(content)
    starts = [0, *(place + 1 for place, byte in enumerate(content[:-1]) if byte == 10)] if content else []
    whole = [(start, content[start:stop]) for start, stop in pairwise([*starts, len(content)])]
    expected = [(s, d if len(d) <= limit else None) for s, d in whole if len(d) > limit or not d.isspace()]
    bounds = sorted({0, *(min(place, len(content)) for place in cuts), len(content)})
    with mock.patch.multiple(module, _CHUNK=chunk, _TAIL=chunk):
        found = [shown(r) for a, b in pairwise(bounds) for r in read_records(Block(str(scratch), a, b), b"\n", limit)]
        striped = [
            [shown(r) for r in read_records(Block(str(scratch), 0, WHOLE, n, stripes), b"\n", limit)] for n in range(stripes)
        ]
    assert found == expected
    assert striped == [expected[n::stripes] for n in range(stripes)]


def test_going_on_behind_a_record_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "%s"}\n' % (b"x" * size) for size in (3, 300, 5, 90, 91, 1000, 0, 4)]
    path.write_bytes(b"".join(lines))
    blocks = cut([str(path)], [path.stat().st_size], 2)
    source = partial(read_blocks, blocks=blocks, read=lambda block: map(str, jsonl.read(block, key="text", limit=103)))
    assert check_resumes(source, limit=20) == len(lines)
    items = [item for block in blocks for item in jsonl.read(block, key="text", limit=103)]
    assert [len(item.text or "") if isinstance(item, Document) else -1 for item in items] == [3, -1, 5, 90, -1, -1, 0, 4]


def peak(read: Callable[[], Sequence[Read]]) -> tuple[Sequence[Read], int]:
    tracemalloc.start()
    try:
        return read(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


READERS: dict[str, Callable[[Block], Sequence[Read]]] = {
    "line": lambda block: list(jsonl.read(block, key="text", limit=LIMIT)),
    "separated": lambda block: list(text.read(block, separator="\n\n", limit=LIMIT)),
    "whole file": lambda block: list(text.read(block, separator=None, limit=LIMIT)),
    "python": lambda block: list(text.read_python(block, limit=LIMIT)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", PACKED)
def test_a_bomb_is_one_bad_record_in_little_memory(tmp_path: Path, name: str, reader: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name](bytes(32 << 20)))
    found, most = peak(lambda: READERS[reader](Block(str(path), 0, WHOLE)))
    assert [str(item).partition("\n")[0] for item in found] == [f"{path}:1 (byte 0): {TOO_LONG}"]
    assert most < 8 << 20


@pytest.mark.parametrize("name", PACKED)
def test_the_records_around_one_that_is_too_long_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name](b'{"text": "a"}\n{"text": "' + b"x" * (5 << 20) + b'"}\n{"text": "b"}\n'))
    first, bad, last = READERS["line"](Block(str(path), 0, WHOLE))
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert (first.text, last.text) == ("a", "b")
    assert str(bad).startswith(f"{path}:2 (byte 14): {TOO_LONG}\n")


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
def test_the_limit_itself_is_allowed(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    pq.write_table(pa.table({"text": ["x" * size]}), tmp_path / "a.parquet")
    for found in (read_whole(str(tmp_path / "a"), LIMIT), read_records(Block(str(tmp_path / "a"), 0, size), b"\n", LIMIT)):
        assert [isinstance(item, DataError) for item in found] == [size > LIMIT]
    (value,) = parquet.read(Block(str(tmp_path / "a.parquet"), 0, 1), key="text", limit=LIMIT)
    assert isinstance(value, DataError) == (size > LIMIT)


def rows(path: Path, limit: int) -> list[int]:
    """The length of each row's text, -1 for a bad record."""
    blocks = parquet.row_groups([str(path)])
    items = [item for block in blocks for item in parquet.read(block, key="text", limit=limit)]
    return [len(item.text or "") if isinstance(item, Document) else -1 for item in items]


def test_a_value_of_parquet_that_is_too_long_is_one_bad_record(tmp_path: Path) -> None:
    sizes = [*range(50), 900, *range(50)]
    pq.write_table(pa.table({"text": ["ü" * size for size in sizes]}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet", 1799) == [*range(50), -1, *range(50)]
    assert rows(tmp_path / "a.parquet", 1800) == sizes


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """Arrow's memory, counted anew: for tests whose files are written before anything else."""
    before = pa.default_memory_pool()
    yield pa.proxy_memory_pool(before)
    pa.set_memory_pool(before)


def test_a_row_group_that_must_hold_more_than_its_rows_may_is_not_decompressed(tmp_path: Path, pool: pa.MemoryPool) -> None:
    pq.write_table(pa.table({"text": ["x" * (20 << 20)]}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    pa.set_memory_pool(pool)
    blocks = parquet.row_groups([str(tmp_path / "a.parquet")])
    striped = (share(blocks, number, 2, None)[0] for number in range(2))
    found = [list(parquet.read(block, key="text", limit=LIMIT)) for block in striped]
    assert pool.max_memory() < 1 << 20
    (error,), () = found
    assert "row group 0: expected rows of at most 1,048,576 bytes (dataset.max_record_bytes), found 20,9" in str(error)


@pytest.mark.parametrize("encoding", ["dictionary", "delta"])
def test_a_value_that_many_rows_share_is_in_memory_once(tmp_path: Path, encoding: str, pool: pa.MemoryPool) -> None:
    table = pa.table({"text": pa.array(["x" * LIMIT] * 100)})
    how = {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "use_dictionary": False} if encoding == "delta" else {}
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30, **how)
    pa.set_memory_pool(pool)
    found = parquet.read(Block(str(tmp_path / "a.parquet"), 0, 1), key="text", limit=LIMIT)
    assert sum(isinstance(item, Document) for item in found) == 100
    assert pool.max_memory() < 16 << 20


def test_the_limit_comes_from_the_reading(tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl": b'{"text": "abcdef"}\n',
        "a.txt": b"abcdefghijklmnopqrs",
        "a.py": b"a = 1, 2, 3, 4, 5, 6\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        for limit in (len(content), len(content) - 1):
            corpus = open_corpus(str(tmp_path / name), byte_tokenizer(), reading=Reading(max_record_bytes=limit))
            (item,) = [item for block in corpus.blocks for item in corpus.read(block)]
            assert isinstance(item, DataError) == (limit < len(content))
