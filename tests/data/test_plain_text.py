from __future__ import annotations

import gzip
import json
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, Document
from fnrecipe.data.blocks import cut
from fnrecipe.data.document import Read
from fnrecipe.data.files import File
from fnrecipe.data.formats.text import python_stdlib, read, read_python
from fnrecipe.data.records import WHOLE
from fnrecipe.errors import DataError, UsageError

BOM = b"\xef\xbb\xbf"
WORD = "<|sep|>"


def whole(path: Path, data: bytes) -> Block:
    path.write_bytes(data)
    return Block(str(path), 0, WHOLE)


def texts(items: Sequence[Read]) -> list[str]:
    assert all(isinstance(item, Document) for item in items)
    return [item.text for item in items if isinstance(item, Document) and item.text is not None]


FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", []),
    "byte order mark": (BOM + b"a\n", ["a\n"]),
    "byte order mark alone": (BOM, []),
    "lines": (b"a\r\n\nb", ["a\r\n\nb"]),
    "white space": (b" \n\t\r\n \xe2\x80\xa8", []),
    "white space around": (b"\n a \n", ["\n a \n"]),
    "characters": ("größe 東京都\0🙂".encode(), ["größe 東京都\0🙂"]),
}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(("data", "expected"), FILES.values(), ids=FILES)
def test_a_file_is_a_document(tmp_path: Path, data: bytes, expected: list[str], name: str) -> None:
    block = whole(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert texts(list(read(block, separator=None))) == expected


SEPARATED: dict[str, tuple[str, bytes, list[str]]] = {
    "lines": ("\n", b"a\n\n \nb\r\n\r\nc\r", ["a", "b", "c\r"]),
    "paragraphs": ("\n\n", b"a\nb\n\nc\n\n\n\nd\n\n\ne\n", ["a\nb", "c", "d", "e\n"]),
    "paragraphs in CRLF": ("\n\n", b"a\r\nb\r\n\r\nc\r\n\r\n\r\nd\r\n\ne\n\r\nf\n", ["a\r\nb", "c", "d", "e", "f\n"]),
    "rules": ("\n---\n", b"a\n---\nb\r\n---\r\nc\r\n---\nd---\n", ["a", "b", "c", "d---\n"]),
    "CRLF itself": ("\r\n", b"a\r\nb\nc\r\n", ["a", "b\nc"]),
    "words": (WORD, b"a<|sep|>b<|sep<|sep|>c", ["a", "b<|sep", "c"]),
    "words at the ends": (WORD, b"<|sep|>a<|sep|><|sep|>b<|sep|>", ["a", "b"]),
    "white space between words": (WORD, b" \n<|sep|>\t<|sep|>a<|sep|>\xc2\xa0", ["a"]),
    "nothing but words": (WORD, b"<|sep|><|sep|>", []),
    "byte order mark": (WORD, BOM + b"a<|sep|>b", ["a", "b"]),
    "byte order mark alone": (WORD, BOM, []),
    "byte order marks of files put end to end": (WORD, BOM + b"a<|sep|>" + BOM + b"b<|sep|>" + BOM, ["a", "b"]),
    "byte order mark and a word": (WORD, BOM + b"<|sep|>a", ["a"]),
    "many bytes": ("§東§", "a§東§ü§東".encode(), ["a", "ü§東"]),
}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(("separator", "data", "expected"), SEPARATED.values(), ids=SEPARATED)
def test_documents_between_separators(tmp_path: Path, separator: str, data: bytes, expected: list[str], name: str) -> None:
    block = whole(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert texts(list(read(block, separator=separator))) == expected


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "a.txt"


PIECES = st.lists(st.sampled_from([WORD, "\n", "\n\n", "a", "ü ", "\r", "<|", "|>"]), max_size=20).map("".join)


@pytest.mark.parametrize(("separator", "pattern"), [(WORD, r"<\|sep\|>"), ("\n\n", r"\r?\n(?:\r?\n)+"), ("\n", r"\r?\n")])
@given(content=PIECES, limit=st.integers(1, 9))
def test_documents_equal_those_of_split(scratch: Path, separator: str, pattern: str, content: str, limit: int) -> None:
    scratch.write_bytes(content.encode())
    blocks = cut([str(scratch)], [len(content.encode())], limit)
    found = texts([item for block in blocks for item in read(block, separator=separator)])
    assert found == [text for text in re.split(pattern, content) if text.strip()]


@pytest.mark.parametrize("separator", [None, WORD])
def test_invalid_utf8_is_named_and_the_rest_is_read(tmp_path: Path, separator: str | None) -> None:
    data = "größe\n".encode() + (WORD.encode() if separator else b"") + b"a\nb\xff"
    block = whole(tmp_path / "a.txt", data + (b"<|sep|>c" if separator else b""))
    *before, error = list(read(block, separator=separator))[: 2 if separator else 1]
    line, byte, inner = (2, 15, 3) if separator else (1, 0, 11)
    assert texts(before) == (["größe\n"] if separator else [])
    place = f"{block.path}:{line} (byte {byte}): expected UTF-8, found byte 0xff at byte {inner} of the record\n"
    assert str(error).startswith(place)
    assert len(str(error).splitlines()) == 2
    assert texts(list(read(block, separator=separator))[2:]) == (["c"] if separator else [])


def test_damage_is_an_error_that_is_a_value(tmp_path: Path) -> None:
    block = whole(tmp_path / "a.txt.gz", gzip.compress(b"a\n\nb\n\n")[:-4])
    for separator, documents in ((None, []), ("\n\n", ["a", "b"])):
        *before, error = read(block, separator=separator)
        assert isinstance(error, DataError)
        assert texts(before) == documents


DECODABLE = {
    "utf-8": ("ü = '🙂'\n".encode(), "ü = '🙂'\n"),
    "byte order mark": (BOM + b"a = 1\n", "a = 1\n"),
    "latin-1": (b"# -*- coding: latin-1 -*-\na = '\xe4\xff'\n", "# -*- coding: latin-1 -*-\na = 'äÿ'\n"),
    "second line": (b"#!python\n# vim: fileencoding=cp1252\n'\x80'\n", "#!python\n# vim: fileencoding=cp1252\n'€'\n"),
    "CRLF": (b"a\r\nb\r\n", "a\nb\n"),
    "empty": (b"", ""),
}

UNDECODABLE = {
    "invalid UTF-8": b"a = '\xe4'\n",
    "not the declared encoding": b"# coding: ascii\n'\xe4'\n",
    "unknown encoding": b"# coding: nonsense\n",
    "an encoding that is not of text": b"# coding: hex\n",
    "an encoding that decodes nothing": b"# coding: undefined\n",
    "mark against declaration": BOM + b"# coding: latin-1\n",
}


@pytest.mark.parametrize(("data", "expected"), DECODABLE.values(), ids=DECODABLE)
def test_python_is_decoded_as_declared(tmp_path: Path, data: bytes, expected: str) -> None:
    assert texts(list(read_python(whole(tmp_path / "a.py", data)))) == [expected]


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
def test_python_that_cannot_be_decoded(tmp_path: Path, data: bytes) -> None:
    block = whole(tmp_path / "a.py", data)
    (error,) = read_python(block)
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{block.path}: expected text in the encoding that it declares: ")


def test_python_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.py: cannot read the data: No such file"):
        list(read_python(Block(str(tmp_path / "gone.py"), 0, WHOLE)))


def test_damaged_python(tmp_path: Path) -> None:
    block = whole(tmp_path / "a.py.gz", gzip.compress(b"a = 1\n")[:-4])
    with pytest.raises(DataError, match=re.escape(f"{block.path}: expected a whole compressed file")):
        list(read_python(block))


@pytest.fixture(scope="module")
def library() -> list[File]:
    return python_stdlib()


def parts(files: Sequence[File]) -> list[tuple[str, ...]]:
    return [Path(file.name).parts for file in files]


def test_the_library_holds_its_modules(library: list[File]) -> None:
    assert {("os.py",), ("json", "decoder.py"), ("email", "mime", "text.py"), ("unittest", "mock.py")} <= set(parts(library))
    assert len(library) == len(set(library)) > 400


def test_the_library_holds_nothing_else(library: list[File]) -> None:
    assert {first.removesuffix(".py") for first, *_ in parts(library)} - sys.stdlib_module_names == set()
    assert [found for found in parts(library) if {"test", "tests", "idle_test", "site-packages"} & set(found)] == []


def test_the_library_is_ordered_by_name_and_measured(library: list[File]) -> None:
    assert parts(library) == sorted(parts(library))
    root = Path(sysconfig.get_path("stdlib"))
    assert [(file.path, file.size) for file in library] == [
        (str(root / file.name), (root / file.name).stat().st_size) for file in library
    ]


def test_the_library_can_be_read(library: list[File]) -> None:
    found = {file.path: texts(list(read_python(Block(file.path, 0, WHOLE)))) for file in library}
    assert all(len(documents) == 1 for documents in found.values())
    assert sum(len(documents[0]) for documents in found.values()) > 5_000_000
    assert found[json.__file__] == [Path(json.__file__).read_text(encoding="utf-8")]


def test_a_python_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        UsageError, match=r"expected the sources of Python's standard library, found none; set dataset\.sources"
    ):
        python_stdlib()
