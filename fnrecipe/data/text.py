"""Sources of text: JSONL cut into blocks of bytes at line starts, and one document a file."""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import attrs
import orjson

from fnrecipe.data.stream import Cursor, Stream
from fnrecipe.errors import DataError, UsageError, did_you_mean

MAX_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_TESTS = {"test", "tests", "idle_test"}


@attrs.frozen
class Block:
    """The lines of a file that start in the bytes [start, stop)."""

    path: str
    start: int
    stop: int


@attrs.frozen
class Line:
    """One line of a file, and the byte offset at which it starts."""

    path: str
    offset: int
    data: bytes


def find_files(pattern: str) -> list[str]:
    """The files that a path names: the file itself, all `*.jsonl` below a directory, or the matches of a glob, sorted.

    Hidden files and folders are not searched.

    Raises:
        UsageError: if there is none.
    """
    if os.path.isfile(pattern):
        return [pattern]
    inside = os.path.join(glob.escape(pattern), "**", "*.jsonl")
    files = sorted(set(filter(os.path.isfile, glob.glob(inside if os.path.isdir(pattern) else pattern, recursive=True))))
    if not files:
        what = "no *.jsonl file in this directory" if os.path.isdir(pattern) else "no such file, directory or match"
        raise UsageError(f"{pattern}: expected JSONL data, found {what}")
    return files


def plan_blocks(paths: Sequence[str], num_lanes: int) -> list[Block]:
    """The files as blocks of at most 1 MiB, small enough that every lane gets several of them.

    Raises:
        UsageError: if all files are empty.
        DataError: if one cannot be read.
    """
    sizes = {}
    for path in paths:
        with _open(path) as file:
            sizes[path] = os.fstat(file.fileno()).st_size
    total = sum(sizes.values())
    if not total:
        raise UsageError(f"{', '.join(paths)}: expected at least one document, found only empty files")
    step = min(MAX_BLOCK_BYTES, -(-total // (16 * num_lanes)))
    return [Block(path, a, min(a + step, size)) for path, size in sizes.items() for a in range(0, size, step)]


def read_lines(cursor: Cursor = None, *, blocks: Sequence[Block]) -> Stream[Line]:
    """The lines of `blocks`, without blank ones. Cursor: [block, byte offset of the next line]."""
    first, offset = cursor or (0, None)
    for number in range(first, len(blocks)):
        block = blocks[number]
        with _open(block.path) as file:
            offset = _first_line_start(file, block) if offset is None else offset
            file.seek(offset)
            while offset < block.stop and (data := file.readline()):
                start, offset = offset, offset + len(data)
                data = data.removeprefix(_BOM) if start == 0 else data
                if data.strip():
                    yield Line(block.path, start, data), (number, offset)
        offset = None


def parse_json(line: Line, *, key: str) -> str:
    """The text field of one JSON line.

    Raises:
        DataError: with file, line, byte offset and an excerpt, if the line is not a JSON object with text at `key`.
    """
    try:
        record = orjson.loads(line.data)
    except orjson.JSONDecodeError as error:
        raise _bad(line, _invalid_utf8(line.data) or f"expected a JSON object, found {error.msg}") from None
    if not isinstance(record, dict):
        raise _bad(line, f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise _bad(line, f"expected the field {key!r}, found none; {did_you_mean(key, record)}".removesuffix("; "))
    text = record[key]
    if not isinstance(text, str):
        raise _bad(line, f"expected text in the field {key!r}, found {type(text).__name__}")
    return text


def read_files(cursor: Cursor = None, *, paths: Sequence[str]) -> Stream[str]:
    """One document a Python source file, decoded as the file itself declares. Cursor: number of the next file."""
    for number in range(cursor or 0, len(paths)):
        try:
            with tokenize.open(paths[number]) as file:
                yield file.read(), number + 1
        except (UnicodeError, LookupError, SyntaxError) as error:
            raise DataError(f"{paths[number]}: expected text in the encoding that it declares: {error}") from None
        except OSError as error:
            raise DataError(f"{paths[number]}: cannot read the data: {error.strerror}") from None


def python_stdlib() -> list[str]:
    """The source files of this Python's standard library without its tests, ordered by their names in it.

    Raises:
        UsageError: if this Python came without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).parts for path in root.rglob("*.py"))
    library = [parts for parts in names if parts[0].removesuffix(".py") in sys.stdlib_module_names and not _TESTS & set(parts)]
    if not library:
        raise UsageError(f"{root}: expected the sources of Python's standard library, found none; use dataset.family=jsonl")
    return [str(root.joinpath(*parts)) for parts in library]


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read the data: {error.strerror}") from None


def _first_line_start(file: BinaryIO, block: Block) -> int:
    """Where the first line of the block begins; the block's end if none does."""
    if block.start == 0:
        return 0
    file.seek(block.start - 1)
    return block.start - 1 + len(file.readline(block.stop - block.start + 1))


def _invalid_utf8(data: bytes) -> str:
    try:
        data.decode()
        return ""
    except UnicodeDecodeError as error:
        return f"expected UTF-8, found byte {data[error.start]:#04x} at byte {error.start} of the line"


def _bad(line: Line, what: str) -> DataError:
    number = 1
    with _open(line.path) as file:
        for start in range(0, line.offset, MAX_BLOCK_BYTES):
            number += file.read(min(MAX_BLOCK_BYTES, line.offset - start)).count(b"\n")
    excerpt = line.data[:80].decode(errors="backslashreplace").rstrip()
    return DataError(f"{line.path}:{number} (byte {line.offset}): {what}\n  {excerpt}")
