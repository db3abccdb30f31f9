from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, Document
from fnrecipe.data.blocks import cut
from fnrecipe.data.document import Read
from fnrecipe.data.formats.jsonl import read
from fnrecipe.data.records import WHOLE
from fnrecipe.errors import DataError

BOM = b"\xef\xbb\xbf"

STORED: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
}


def stored(folder: Path, suffix: str, data: bytes) -> Block:
    path = folder / f"some{suffix}"
    path.write_bytes(STORED[suffix](data))
    return Block(str(path), 0, WHOLE)


def texts(items: Sequence[Read]) -> list[str | None]:
    return [item.text if isinstance(item, Document) else str(item) for item in items]


GOOD: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (b"", []),
    "one": (b'{"text": "a"}\n', ["a"]),
    "no final newline": (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "blank lines": (b'\n\n{"text": "a"}\n \t\r\n\n{"text": "b"}\n\n', ["a", "b"]),
    "CRLF": (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    "byte order mark": (BOM + b'{"text": "a"}\n', ["a"]),
    "byte order mark alone": (BOM, []),
    "byte order mark and a blank line": (BOM + b'\n{"text": "a"}', ["a"]),
    "empty documents": (b'{"text": ""}\n{"text": ""}\n', ["", ""]),
    "white space is text": (b'{"text": " \\n"}', [" \n"]),
    "escapes": (rb'{"text": "\u00fc \n \ud83d\ude42 \u0000"}', ["ü \n 🙂 \0"]),
    "other line ends in the text": ('{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
    "other fields": (b'{"id": 1, "text": "a", "meta": {"text": 3}}', ["a"]),
    "space around": (b'  {"text": "a"}  \n', ["a"]),
    "byte order marks of files put end to end": (BOM + b'{"text": "a"}\n' + BOM + b'{"text": "b"}\n' + BOM + b"\n", ["a", "b"]),
    "the last of a field that is there twice": (b'{"text": 3, "text": "a"}', ["a"]),
    "the last of a field that is there twice, with NaN": (b'{"text": 3, "x": NaN, "text": "a"}', ["a"]),
}


ELSEWHERE = {
    "NaN": b"NaN",
    "infinities": b"[Infinity, -Infinity]",
    "lone surrogate": rb'"\ud800"',
    "invalid UTF-8": b'"\xff"',
    "raw control character": b'"\x1b"',
    "huge integer": b"9" * 5000,
    "huge float": b"1e999",
}


@pytest.mark.parametrize("trouble", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_field_that_is_not_read_is_not_judged(tmp_path: Path, trouble: bytes) -> None:
    text = json.dumps('größe 🙂\n\t"').encode()
    block = stored(tmp_path, ".jsonl", b'{"a": ' + trouble + b', "text": ' + text + b', "z": {"text": ' + trouble + b"}}\n")
    assert texts(list(read(block, key="text"))) == ['größe 🙂\n\t"']
    assert [isinstance(item, DataError) for item in read(block, key="a")] == [True]


@pytest.mark.parametrize("suffix", STORED)
@pytest.mark.parametrize(("data", "expected"), GOOD.values(), ids=GOOD)
def test_the_documents_of_a_file(tmp_path: Path, data: bytes, expected: list[str], suffix: str) -> None:
    assert texts(list(read(stored(tmp_path, suffix, data), key="text"))) == expected


def test_another_field(tmp_path: Path) -> None:
    block = stored(tmp_path, ".jsonl", b'{"text": 3, "body": "a"}\n')
    assert texts(list(read(block, key="body"))) == ["a"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl")


@given(documents=st.lists(st.text(st.characters(codec="utf-8"))), ascii_only=st.booleans())
def test_what_json_writes_is_read(scratch: Path, documents: list[str], ascii_only: bool) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\n" for text in documents]
    path = scratch / "written.jsonl"
    path.write_bytes(b"".join(lines))
    blocks = cut([str(path)], [path.stat().st_size], max(path.stat().st_size // 16, 1))
    assert texts([item for block in blocks for item in read(block, key="text")]) == documents


BAD_LINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "corrupt": (b'{"text": "abc', ("expected a JSON object, found ", '{"text": "abc')),
    "trailing comma": (b'{"text": "abc",}', ("expected a JSON object, found ",)),
    "two objects": (b'{"text": "a"} {"text": "b"}', ("expected a JSON object, found ",)),
    "raw control character": (b'{"text": "a\x1bb"}', ("expected a JSON object, found ", "a\\x1bb")),
    "lone high surrogate": (rb'{"text": "\ud800"}', ("expected a JSON object, found ", "surrogate", r"\ud800")),
    "lone low surrogate": (rb'{"text": "a\udc00b"}', ("expected a JSON object, found ", "surrogate", r"\udc00")),
    "surrogates the wrong way round": (rb'{"text": "\udc00\ud800"}', ("expected a JSON object, found ", "surrogate")),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', ("expected UTF-8, found byte 0xed at byte 10 of the record",)),
    "invalid UTF-8": (b'{"text": "\xc3\xa4\xff"}', ("expected UTF-8, found byte 0xff at byte 12 of the record", "\\xff")),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), ("expected UTF-8, found UTF-16 (convert it: iconv -f UTF-16 -t UTF-8)",)),
    "UTF-16 without a mark": ('{"text": "a"}'.encode("utf-16-le"), ("expected UTF-8, found what looks like UTF-16 (convert",)),
    "gzip": (gzip.compress(b"a", mtime=0)[:9], ("expected UTF-8, found gzip data, whose name should end in .gz",)),
    "cut UTF-8": (b'{"text": "\xf0\x9f\x99"}', ("expected UTF-8, found byte 0xf0 at byte 10 of the record",)),
    "NaN": (b'{"text": NaN}', ("expected text in the field 'text', found float",)),
    "NaN alone": (b"NaN", ("expected a JSON object, found ",)),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", ("expected text in the field 'text', found ",)),
    "nested too deeply": (b"[" * 100_000, ("expected a JSON object, found ", "[[[[")),
    "array": (b'["text"]', ("expected a JSON object, found list", '["text"]')),
    "string": (b'"text"', ("expected a JSON object, found str",)),
    "null": (b"null", ("expected a JSON object, found NoneType",)),
    "mistyped field": (b'{"texts": "a", "id": 1}', ("expected the field 'text', found none; did you mean texts?", '{"texts"')),
    "other case": (b'{"Text": "a"}', ("expected the field 'text', found none; did you mean Text?",)),
    "other fields": (b'{"zzz": "a", "id": 1}', ("expected the field 'text', found none; valid names: id, zzz",)),
    "no field": (b"{}", ("expected the field 'text', found none\n",)),
    "number": (b'{"text": 3}', ("expected text in the field 'text', found int",)),
    "list": (b'{"text": ["a"]}', ("expected text in the field 'text', found list",)),
    "null text": (b'{"text": null}', ("expected text in the field 'text', found NoneType",)),
    "long": (b'{"text": 3, "rest": "' + b"r" * 500 + b'"}', ("found int", "rrr")),
}


@pytest.mark.parametrize("suffix", STORED)
@pytest.mark.parametrize(("bad", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_errors_are_values_that_name_the_place(tmp_path: Path, bad: bytes, expected: tuple[str, ...], suffix: str) -> None:
    good = BOM + '{"text": "größe"}\r\n\n{"text": "🙂"}\n'.encode()
    block = stored(tmp_path, suffix, good + bad + b'\n{"text": "after"}\n')
    *before, error, after = read(block, key="text")
    assert texts([*before, after]) == ["größe", "🙂", "after"]
    assert isinstance(error, DataError)
    message = str(error)
    assert message.startswith(f"{block.path}:4 (byte {len(good)}): ")
    assert all(part in message for part in expected), message
    assert len(message.splitlines()) == 2
    assert 2 < len(message.splitlines()[1]) <= 100


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_errors_name_the_same_place_in_blocks_of_any_size(tmp_path: Path, step: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": 3}\n{"text": "b"}\n')
    size = path.stat().st_size
    blocks = [Block(str(path), start, min(start + step, size)) for start in range(0, size, step)]
    first, error, last = [item for block in blocks for item in read(block, key="text")]
    assert texts([first, last]) == ["a", "b"]
    assert str(error).startswith(f"{path}:3 (byte 15): expected text in the field 'text', found int\n")


@pytest.mark.parametrize("suffix", STORED)
def test_the_line_number_is_right_in_the_middle_of_a_big_file(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": "ü" * (i % 50)}, ensure_ascii=False).encode() for i in range(40_000)]
    lines[31_234] = b"{broken"
    data = b"\n".join(lines)
    assert len(data) > 2 << 20
    offset = sum(len(line) + 1 for line in lines[:31_234])
    block = stored(tmp_path, suffix, data)
    (error,) = [item for item in read(block, key="text") if isinstance(item, DataError)]
    assert str(error).startswith(f"{block.path}:31235 (byte {offset}): expected a JSON object, found ")
    assert str(error).endswith("\n  {broken")


def test_the_error_of_damage_is_handed_on(tmp_path: Path) -> None:
    block = stored(tmp_path, ".jsonl.gz", b'{"text": "a"}\n' * 3)
    path = Path(block.path)
    path.write_bytes(path.read_bytes()[:-4])
    *documents, error = read(block, key="text")
    assert texts(documents) == ["a"] * 3
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{path} (byte 42 of its content): expected a whole compressed file, found damage")
