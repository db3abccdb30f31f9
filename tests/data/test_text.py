from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, find_files, parse_json, plan_blocks, python_stdlib, read_files, read_lines
from fnrecipe.data.text import Line
from fnrecipe.errors import DataError, UsageError
from tests.data.laws import check_resumes, items

BOM = b"\xef\xbb\xbf"

FILES = {
    "empty": b"",
    "one newline": b"\n",
    "one line": b'{"text": "a"}\n',
    "no final newline": b"one\ntwo\nthree",
    "blank lines": b"\n\none\n\n\n  \t\ntwo\n\n",
    "CRLF": b"one\r\n\r\ntwo\r\nthree\r\n",
    "lone CR is no line end": b"one\rtwo\nthree",
    "BOM": BOM + b"one\ntwo\n",
    "BOM only": BOM,
    "BOM and a blank line": BOM + b"\r\none\n",
    "BOM in the middle": b"one\n" + BOM + b"two\n",
    "one huge line": b"x" * 120,
    "a huge line between short ones": b"a\n" + b"x" * 90 + b"\nb\nc",
    "many bytes a character": "größe\n東京都\n🙂🙃\n\u2028\u0085x\n".encode(),
    "not UTF-8": b"\xff\xfe\n\x80\n",
}


def slow_lines(data: bytes) -> list[tuple[int, bytes]]:
    """(offset, content) of every line that is not blank."""
    found = [(match.start(), match.group()) for match in re.finditer(rb"[^\n]*\n|[^\n]+", data)]
    stripped = [(start, line[3:] if start == 0 and line.startswith(BOM) else line) for start, line in found]
    return [(start, line) for start, line in stripped if line.strip()]


def blocks_at(path: Path, cuts: Sequence[int]) -> list[Block]:
    return [Block(str(path), start, stop) for start, stop in pairwise(cuts)]


def even_blocks(path: Path, step: int) -> list[Block]:
    size = path.stat().st_size
    return blocks_at(path, [*range(0, size, step), size])


def lines_of(blocks: Sequence[Block]) -> list[tuple[int, bytes]]:
    return [(line.offset, line.data) for line in items(partial(read_lines, blocks=blocks))]


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_every_line_once_whatever_the_block_size(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(data)
    for step in range(1, len(data) + 2):
        assert lines_of(even_blocks(path, step)) == slow_lines(data), f"blocks of {step} bytes"


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_read_lines_resumes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(data)
    for step in (1, 3, 7, len(data) + 1):
        blocks = even_blocks(path, step)
        for order in (blocks, blocks[::-1], blocks[::2] + blocks[1::2]):
            assert check_resumes(partial(read_lines, blocks=order), limit=20) == min(len(slow_lines(data)), 20)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "lines"


@given(
    pieces=st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"bc ", BOM, b"\x00", b"\x85", "ü".encode()]), max_size=20),
    data=st.data(),
)
def test_every_line_once_whatever_the_cuts_and_their_order(scratch: Path, pieces: list[bytes], data: st.DataObject) -> None:
    content = b"".join(pieces)
    scratch.write_bytes(content)
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=8))
    blocks = data.draw(st.permutations(blocks_at(scratch, [0, *sorted(cuts), len(content)])))
    assert sorted(lines_of(blocks)) == slow_lines(content)


def test_a_line_longer_than_many_blocks(tmp_path: Path) -> None:
    huge = json.dumps({"text": "x" * (3 << 20)}).encode()
    path = tmp_path / "huge.jsonl"
    path.write_bytes(b"first\n" + huge + b"\nlast")
    blocks = plan_blocks([str(path)], num_lanes=1)
    assert len(blocks) > 4
    assert [data.strip() for _, data in lines_of(blocks)] == [b"first", huge, b"last"]


def test_lines_know_their_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"{name}1\n{name}2\n")
    lines = items(partial(read_lines, blocks=[*even_blocks(tmp_path / "b", 2), *even_blocks(tmp_path / "a", 99)]))
    expected = [("b", 0, b"b1\n"), ("b", 3, b"b2\n"), ("a", 0, b"a1\n"), ("a", 3, b"a2\n")]
    assert lines == [Line(str(tmp_path / name), offset, data) for name, offset, data in expected]


def test_parse_json_takes_the_field() -> None:
    assert parse_json(Line("f", 0, b'{"n": 1, "body": "a \\u00fc \\n b"}\r\n'), key="body") == "a ü \n b"
    assert parse_json(Line("f", 0, b'{"text": ""}'), key="text") == ""


BAD_LINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "corrupt": (b'{"text": "abc', ("expected a JSON object, found ", '{"text": "abc')),
    "trailing comma": (b'{"text": "abc",}', ("expected a JSON object, found ",)),
    "lone surrogate": (rb'{"text": "\ud800"}', ("expected a JSON object, found ", "surrogate")),
    "invalid UTF-8": (b'{"text": "\xc3\xa4\xff"}', ("expected UTF-8, found byte 0xff at byte 12 of the line", "\\xff")),
    "array": (b'["text"]', ("expected a JSON object, found list", '["text"]')),
    "null": (b"null", ("expected a JSON object, found NoneType",)),
    "mistyped field": (b'{"texts": "a", "id": 1}', ("expected the field 'text', found none; did you mean texts?", '{"texts"')),
    "other fields": (b'{"zzz": "a", "id": 1}', ("expected the field 'text', found none; valid names: id, zzz",)),
    "no field": (b"{}", ("expected the field 'text', found none\n",)),
    "number": (b'{"text": 3}', ("expected text in the field 'text', found int",)),
    "null text": (b'{"text": null}', ("expected text in the field 'text', found NoneType",)),
    "long": (b'{"text": 3, "rest": "' + b"r" * 500 + b'"}', ("found int", "rrr")),
}


def read_texts(blocks: Sequence[Block]) -> list[str]:
    return [parse_json(line, key="text") for line, _ in read_lines(blocks=blocks)]


@pytest.mark.parametrize("step", [5, 1000])
@pytest.mark.parametrize(("bad", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_errors_name_the_place(tmp_path: Path, bad: bytes, expected: tuple[str, ...], step: int) -> None:
    good = BOM + '{"text": "größe"}\r\n\n{"text": "🙂"}\n'.encode()
    path = tmp_path / "some.jsonl"
    path.write_bytes(good + bad + b'\n{"text": "after"}\n')
    with pytest.raises(DataError) as caught:
        read_texts(even_blocks(path, step))
    message = str(caught.value)
    assert message.startswith(f"{path}:4 (byte {len(good)}): ")
    assert all(part in message for part in expected), message
    assert len(message.splitlines()) == 2
    assert len(message.splitlines()[1]) <= 100


def test_the_line_number_is_right_in_the_middle_of_a_big_file(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "ü" * (i % 50)}, ensure_ascii=False).encode() for i in range(60000)]
    lines[41234] = b"{broken"
    path = tmp_path / "big.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert path.stat().st_size > 2 << 20
    offset = sum(len(line) + 1 for line in lines[:41234])
    with pytest.raises(DataError, match=rf"big\.jsonl:41235 \(byte {offset}\): .*\n  {{broken$"):
        read_texts(plan_blocks([str(path)], num_lanes=4))


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    blocks = even_blocks(path, 4)
    stream = read_lines(blocks=blocks)
    line, _ = next(stream)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot read the data: No such file"):
        list(stream)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        parse_json(line, key="text")
    with pytest.raises(DataError, match=r"a\.jsonl"):
        plan_blocks([str(path)], num_lanes=1)


@pytest.mark.parametrize("size", [0, 1, 20, 23, 40])
def test_a_file_that_shrinks_gives_what_is_left_of_it(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0123456\n" * 10)
    blocks = even_blocks(path, 5)
    with path.open("r+b") as file:
        file.truncate(size)
    assert lines_of(blocks) == slow_lines(path.read_bytes())


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')


TREE = [
    "b.jsonl",
    "a.jsonl",
    "a.txt",
    "sub/c.jsonl",
    "sub/deep/d.jsonl",
    "[x]/e.jsonl",
    "x/f.jsonl",
    "wh?.jsonl",
    "a[bc].jsonl",
]

PATTERNS: dict[str, list[str]] = {
    "a.jsonl": ["a.jsonl"],
    "a.txt": ["a.txt"],
    "sub": ["sub/c.jsonl", "sub/deep/d.jsonl"],
    "sub/": ["sub/c.jsonl", "sub/deep/d.jsonl"],
    "sub/*.jsonl": ["sub/c.jsonl"],
    "sub/**/*.jsonl": ["sub/c.jsonl", "sub/deep/d.jsonl"],
    "?.jsonl": ["a.jsonl", "b.jsonl"],
    "a.*": ["a.jsonl", "a.txt"],
    "[ab].jsonl": ["a.jsonl", "b.jsonl"],
    "[x]": ["[x]/e.jsonl"],  # the directory of that name, not the pattern
    "wh?.jsonl": ["wh?.jsonl"],
    "a[bc].jsonl": ["a[bc].jsonl"],
    "sub*": [],  # a directory that matches is no file
    "**/**/d.jsonl": ["sub/deep/d.jsonl"],
    "": sorted(name for name in TREE if name.endswith(".jsonl")),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_find_files(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, *TREE)
    expected = [str(tmp_path / name) for name in PATTERNS[pattern]]
    if expected:
        assert [str(Path(path)) for path in find_files(f"{tmp_path}/{pattern}")] == expected
    else:
        with pytest.raises(UsageError, match="no such file, directory or match"):
            find_files(f"{tmp_path}/{pattern}")


def test_find_files_says_what_it_expected(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: expected JSONL data, found no *.jsonl file in this")):
        find_files(str(tmp_path))
    with pytest.raises(UsageError, match=r"absent\.jsonl: expected JSONL data, found no such file, directory or match"):
        find_files(str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("sizes", [(1,), (15, 0, 3), (128,), (129,), (1000, 1), (40 << 20, 7), (3,) * 50])
@pytest.mark.parametrize("num_lanes", [1, 8])
def test_plan_blocks_covers_every_byte_once(tmp_path: Path, sizes: tuple[int, ...], num_lanes: int) -> None:
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "wb") as file:
            file.truncate(size)
    blocks = plan_blocks(paths, num_lanes)
    for path, size in zip(paths, sizes, strict=True):
        mine = [block for block in blocks if block.path == path]
        assert [block.start for block in mine] + [size] == [0] + [block.stop for block in mine]
    assert all(0 < block.stop - block.start <= 1 << 20 for block in blocks)
    assert len(blocks) >= min(sum(sizes), 8 * num_lanes)


def test_plan_blocks_takes_a_file_that_is_named_twice_once(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert plan_blocks([a, b, a], 2) == plan_blocks([a, b], 2)


def test_plan_blocks_refuses_empty_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"a, .*b: expected at least one document, found only empty files"):
        plan_blocks([str(tmp_path / "a"), str(tmp_path / "b")], 8)


@pytest.fixture(scope="module")
def library() -> list[tuple[str, ...]]:
    root = sysconfig.get_path("stdlib")
    return [Path(path).relative_to(root).parts for path in python_stdlib()]


def test_python_stdlib_holds_the_library(library: list[tuple[str, ...]]) -> None:
    assert {("os.py",), ("json", "decoder.py"), ("email", "mime", "text.py"), ("unittest", "mock.py")} <= set(library)
    assert len(library) == len(set(library)) > 400


def test_python_stdlib_holds_nothing_else(library: list[tuple[str, ...]]) -> None:
    assert {parts[0].removesuffix(".py") for parts in library} - sys.stdlib_module_names == set()
    assert [parts for parts in library if {"test", "tests", "idle_test", "site-packages"} & set(parts)] == []


def test_python_stdlib_is_ordered_by_name(library: list[tuple[str, ...]]) -> None:
    assert library == sorted(library)


def test_python_stdlib_can_be_read() -> None:
    paths = python_stdlib()
    texts = items(partial(read_files, paths=paths))
    assert len(texts) == len(paths)
    assert sum(map(len, texts)) > 5_000_000
    assert texts[paths.index(json.__file__)] == Path(json.__file__).read_text(encoding="utf-8")


def test_python_stdlib_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"expected the sources of Python's standard library, found none; use dataset\.family"):
        python_stdlib()


DECODABLE = {
    "utf-8": ("ü = '🙂'\n".encode(), "ü = '🙂'\n"),
    "byte order mark": (BOM + b"a = 1\n", "a = 1\n"),
    "latin-1": (b"# -*- coding: latin-1 -*-\na = '\xe4\xff'\n", "# -*- coding: latin-1 -*-\na = 'äÿ'\n"),
    "second line": (
        b"#!python\n# vim: fileencoding=cp1252\n'\x80'\n",
        "#!python\n# vim: fileencoding=cp1252\n'€'\n",
    ),
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


def test_read_files_decodes_as_declared(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.py") for number in range(len(DECODABLE))]
    for path, (data, _) in zip(paths, DECODABLE.values(), strict=True):
        Path(path).write_bytes(data)
    source = partial(read_files, paths=paths)
    assert items(source) == [text for _, text in DECODABLE.values()]
    assert check_resumes(source, limit=99) == len(paths)


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
def test_read_files_names_a_file_that_it_cannot_decode(tmp_path: Path, data: bytes) -> None:
    paths = [tmp_path / "good.py", tmp_path / "bad.py"]
    paths[0].write_bytes(b"a = 1\n")
    paths[1].write_bytes(data)
    stream = read_files(paths=list(map(str, paths)))
    assert next(stream) == ("a = 1\n", 1)
    with pytest.raises(DataError, match=r"bad\.py: expected text in the encoding that it declares: "):
        next(stream)


def test_read_files_names_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.py: cannot read the data: No such file"):
        list(read_files(paths=[str(tmp_path / "gone.py")]))
