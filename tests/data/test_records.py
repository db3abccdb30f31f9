from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.data import Block
from fnrecipe.data import records as module
from fnrecipe.data.blocks import cut
from fnrecipe.data.records import WHOLE, Record, read_records, read_whole, record_starts
from fnrecipe.errors import DataError

BOM = b"\xef\xbb\xbf"
LINE = b"\n"
SEPARATOR = b"<|sep|>"

Found = list[tuple[int, bytes]]


def slow_starts(data: bytes, separator: bytes) -> list[int]:
    """The file's start and every place behind a separator, with line ends of either kind, also where two of them overlap."""
    parts = separator.split(b"\n")
    forms = [
        b"".join(p + e for p, e in zip(parts, (*ends, b""), strict=True))
        for ends in product((b"\n", b"\r\n"), repeat=len(parts) - 1)
    ]
    behind = [end for end in range(len(separator), len(data)) if data[:end].endswith(tuple(forms))]
    return [0, *behind] if data else []


def slow_records(data: bytes, separator: bytes) -> Found:
    found = [(start, data[start:stop]) for start, stop in pairwise([*slow_starts(data, separator), len(data)])]
    return [(start, record.removeprefix(BOM)) for start, record in found if not record.isspace()]


def blocks_at(path: Path, cuts: Sequence[int]) -> list[Block]:
    return [Block(str(path), start, stop) for start, stop in pairwise(cuts)]


def even_blocks(path: Path, step: int) -> list[Block]:
    size = path.stat().st_size
    return blocks_at(path, [*range(0, size, step), size])


def records_of(blocks: Sequence[Block], separator: bytes) -> Found:
    found = [record for block in blocks for record in read_records(block, separator)]
    assert all(isinstance(record, Record) for record in found)
    return [(record.offset, record.data) for record in found if isinstance(record, Record)]


FILES = {
    "empty": b"",
    "one newline": b"\n",
    "no final newline": b"one\ntwo\nthree",
    "blank lines": b"\n\none\n\n\n  \t\ntwo\n\n",
    "CRLF": b"one\r\n\r\ntwo\r\nthree\r\n",
    "lone CR is no line end": b"one\rtwo\nthree",
    "BOM": BOM + b"one\ntwo\n",
    "BOM only": BOM,
    "BOM and a blank line": BOM + b"\r\none\n",
    "BOM in the middle": b"one\n" + BOM + b"two\n",
    "a huge line between short ones": b"a\n" + b"x" * 90 + b"\nb\nc",
    "many bytes a character": "größe\n東京都\n🙂🙃\n\u2028\u0085x\n".encode(),
    "not UTF-8": b"\xff\xfe\n\x80\n",
    "separators": b"a" + SEPARATOR + SEPARATOR + b"b<|sep|<|sep|>>" + SEPARATOR,
    "only a separator": SEPARATOR,
}


@pytest.mark.parametrize("separator", [LINE, b"\n\n", SEPARATOR], ids=["line", "paragraph", "word"])
@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_every_record_once_whatever_the_block_size(tmp_path: Path, data: bytes, separator: bytes) -> None:
    path = tmp_path / "records"
    path.write_bytes(data)
    for step in range(1, len(data) + 2):
        assert records_of(even_blocks(path, step), separator) == slow_records(data, separator), f"blocks of {step} bytes"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "records"


# Separators, and the pieces that files are put together from: also parts of the separator, so that some are almost there.
PIECES: dict[bytes, list[bytes]] = {
    LINE: [b"\n", b"\r\n", b"a", b"bc ", BOM, b"\x00"],
    b"\n\n": [b"\n", b"\n\n", b"a", b"\r\n", b" ", b"\r"],
    b"\n--\n": [b"\n--", b"\n", b"\r\n", b"--\r\n", b"\r", b"a", BOM],
    SEPARATOR: [SEPARATOR, b"<|sep", b"|>", b"<|", b"sep", b"a\n", BOM],
    b"aba": [b"a", b"b", b"aba", b"c"],
    b"aa": [b"a", b"aaa", b"b"],
}


@pytest.mark.parametrize("chunk", [2, 1 << 20])
@pytest.mark.parametrize("separator", PIECES, ids=["line", "paragraph", "rule", "word", "aba", "aa"])
@settings(max_examples=50)
@given(data=st.data())
def test_every_record_once_whatever_the_cuts_and_their_order(
    scratch: Path, separator: bytes, chunk: int, data: st.DataObject
) -> None:
    content = b"".join(data.draw(st.lists(st.sampled_from(PIECES[separator]), max_size=20)))
    scratch.write_bytes(content)
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=8))
    blocks = data.draw(st.permutations(blocks_at(scratch, [0, *sorted(cuts), len(content)])))
    with mock.patch.multiple(module, _CHUNK=chunk, _TAIL=chunk):
        found = records_of(blocks, separator)
        starts = record_starts(str(scratch), len(content), separator)
    assert sorted(found) == slow_records(content, separator)
    assert starts.tolist() == slow_starts(content, separator)
    assert starts.dtype == np.int64


@given(content=st.lists(st.sampled_from([b"\n", b"a", b"bc"]), max_size=30).map(b"".join), stripes=st.integers(1, 5))
def test_stripes_share_the_records_out_in_turn(scratch: Path, content: bytes, stripes: int) -> None:
    scratch.write_bytes(content)
    for stripe in range(stripes):
        block = Block(str(scratch), 0, len(content), stripe, stripes)
        assert records_of([block], LINE) == slow_records(content, LINE)[stripe::stripes]


@pytest.mark.parametrize("separator", [LINE, b"\n\n", SEPARATOR], ids=["line", "paragraph", "word"])
def test_records_longer_than_many_blocks(tmp_path: Path, separator: bytes) -> None:
    huge = bytes(3 << 20)
    path = tmp_path / "huge"
    path.write_bytes(separator.join([b"first", huge, b"second", huge[5:], b"last"]))
    bounds = np.cumsum([0, *(len(part) + len(separator) for part in (b"first", huge, b"second", huge[5:]))]).tolist()
    size = path.stat().st_size
    blocks = cut([str(path)], [size], max(size // 16, 1))
    assert len(blocks) > 10
    found = records_of(list(blocks), separator)
    assert [(offset, len(data)) for offset, data in found] == [(a, b - a) for a, b in pairwise([*bounds, size])]
    assert record_starts(str(path), size, separator).tolist() == bounds


@pytest.mark.parametrize("shift", range(-8, 3))
def test_separators_across_the_ends_of_real_blocks(tmp_path: Path, shift: int) -> None:
    data = bytearray(b"x" * (3 << 20))
    for end in (1 << 20, 2 << 20):
        data[end + shift : end + shift + len(SEPARATOR)] = SEPARATOR
    path = tmp_path / "a"
    path.write_bytes(data)
    starts = [0, *((end << 20) + shift + len(SEPARATOR) for end in (1, 2))]
    assert [offset for offset, _ in records_of(even_blocks(path, 1 << 20), SEPARATOR)] == starts
    assert record_starts(str(path), len(data), SEPARATOR).tolist() == starts


def test_records_know_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a1\na2")
    assert list(read_records(Block(str(path), 0, 5), LINE)) == [Record(str(path), 0, b"a1\n"), Record(str(path), 3, b"a2")]


def test_a_bad_record_is_named_by_line_and_byte_in_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("größe\n".encode() * 3 + b"one\n\x1b[1mtwo\nthree" + b"." * 100)
    *_, record = read_records(Block(str(path), 0, WHOLE), b"e\n")
    assert isinstance(record, Record)
    first, second = str(record.bad("expected this, found that")).splitlines()
    assert first == f"{path}:5 (byte {8 * 3 + 4}): expected this, found that"
    assert second.startswith("  \\x1b[1mtwo\\nthree...")
    assert len(second) <= 100


@pytest.mark.parametrize("size", [0, 1, 20, 23, 79])
def test_a_file_that_shrinks(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0123456\n" * 10)
    blocks = even_blocks(path, 5)
    with path.open("r+b") as file:
        file.truncate(size)
    for block in blocks:
        if block.stop <= size:
            records_of([block], LINE)
        else:
            expected = f"^{path}: expected {block.stop} bytes or more, as when the run began, found its end after {size}$"
            with pytest.raises(DataError, match=expected):
                records_of([block], LINE)


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    (record, _) = read_records(Block(str(path), 0, 8), LINE)
    path.unlink()
    assert isinstance(record, Record)
    for read in (lambda: list(read_records(Block(str(path), 4, 8), LINE)), lambda: record_starts(str(path), 8, LINE)):
        with pytest.raises(DataError, match=r"a\.jsonl: cannot read the data: No such file"):
            read()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot read the data: No such file"):
        record.bad("expected this")


WHOLES = {"empty": (b"", []), "BOM only": (BOM, []), "BOM": (BOM + b"a\n", [b"a\n"]), "lines": (b"a\nb", [b"a\nb"])}


@pytest.mark.parametrize(("data", "expected"), WHOLES.values(), ids=WHOLES)
def test_a_file_as_one_record(tmp_path: Path, data: bytes, expected: list[bytes]) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data))
    assert list(read_whole(str(path))) == [Record(str(path), 0, record) for record in expected]


LINES = [b"%d %s\n" % (i, np.random.Generator(np.random.Philox(i)).bytes(40).hex().encode()) for i in range(4000)]
CONTENT = b"".join(LINES)


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def check_damaged(path: Path, stored: bytes, expected: bytes) -> None:
    """The records that lie in `expected`, the part of the content that can be had; then an error that is a value."""
    path.write_bytes(stored)
    lines = expected.splitlines(keepends=True)
    whole = lines[: len(lines) - (not expected.endswith(LINE))] if lines else []
    *records, error = read_records(Block(str(path), 0, WHOLE), LINE)
    assert [record.data for record in records if isinstance(record, Record)] == whole
    assert len(records) == len(whole)
    assert isinstance(error, DataError)
    place = f"{path} (byte {len(b''.join(whole))} of its content): expected a whole compressed file, found damage: "
    assert str(error).startswith(place)


GZ = gzip.compress(CONTENT)
FRAMES = [zstd(b"".join(LINES[start : start + 500])) for start in range(0, 4000, 500)]


@pytest.mark.parametrize("size", [1, 9, 11, 500, len(GZ) // 2, len(GZ) - 20, len(GZ) - 8, len(GZ) - 1])
def test_a_cut_off_gz_gives_all_that_is_left(tmp_path: Path, size: int) -> None:
    check_damaged(tmp_path / "a.gz", GZ[:size], zlib.decompressobj(31).decompress(GZ[:size]))


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_a_cut_off_zst_gives_its_whole_frames(tmp_path: Path, frames: int) -> None:
    stored = b"".join(FRAMES[:frames]) + FRAMES[frames][:-3]
    check_damaged(tmp_path / "a.zst", stored, b"".join(LINES[: 500 * frames]))


DAMAGED = {
    "checksum.gz": GZ[:-8] + bytes([GZ[-8] ^ 1]) + GZ[-7:],
    "length.gz": GZ[:-1] + bytes([GZ[-1] ^ 1]),
    "garbage.gz": GZ + b"garbage",
    "garbage.bz2": bz2.compress(CONTENT) + b"garbage",
    "stream.bz2": bz2.compress(CONTENT) + bz2.compress(b"more\n")[:8],
    "garbage.xz": lzma.compress(CONTENT) + b"garbage",
    "stream.xz": lzma.compress(CONTENT) + bytes(4) + lzma.compress(b"more\n")[:20],
    "garbage.zst": b"".join(FRAMES) + b"garbage",
    "member.gz": GZ + gzip.compress(b"more\n")[:8],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_behind_the_content_comes_after_all_records(tmp_path: Path, name: str) -> None:
    check_damaged(tmp_path / name, DAMAGED[name], CONTENT)


@pytest.mark.parametrize("name", ["a.gz", "a.bz2", "a.xz", "a.zst"])
def test_what_is_not_compressed_at_all(tmp_path: Path, name: str) -> None:
    check_damaged(tmp_path / name, b"plain\ntext\n", b"")


@pytest.mark.parametrize("place", [40, len(GZ) // 2])
def test_wrong_bytes_in_a_gz_end_it_with_an_error(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(GZ[:place] + bytes(byte ^ 0x55 for byte in GZ[place : place + 8]) + GZ[place + 8 :])
    items = list(read_records(Block(str(path), 0, WHOLE), LINE))
    assert [number for number, item in enumerate(items) if isinstance(item, DataError)] == [len(items) - 1]


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
def test_a_cut_off_file_as_one_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes({"a.gz": GZ, "a.zst": FRAMES[0]}[name][:-9])
    (error,) = read_whole(str(path))
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{path} (byte 0 of its content): expected a whole compressed file, found damage")


@pytest.mark.parametrize("stripes", [1, 3])
def test_stripes_of_a_compressed_file(tmp_path: Path, stripes: int) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(b"".join(FRAMES))
    for stripe in range(stripes):
        found = records_of([Block(str(path), 0, WHOLE, stripe, stripes)], LINE)
        assert [data for _, data in found] == LINES[stripe::stripes]
        assert [CONTENT[offset : offset + len(data)] for offset, data in found] == LINES[stripe::stripes]
