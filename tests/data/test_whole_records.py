"""Whole records from lines, arrays and Parquet: the same ones, once each, whatever the readers; errors with their places."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fnrecipe.data import Document, Reading, byte_tokenizer, open_corpus, share
from fnrecipe.data.formats.python_functions import PYTHON_FUNCTIONS, PYTHON_PREFERENCES, SHORT
from fnrecipe.data.formats.whole_records import whole_records
from fnrecipe.errors import DataError, UsageError
from fnrecipe.recipes.preference.config import config as preference_config

RECORDS = [{"prompt": f"größe {number}", "completion": "x" * number} for number in range(200)]
FORMATS = whole_records(["prompt", "completion"])
TOKENIZER = byte_tokenizer()


def write(path: Path) -> Path:
    lines = [json.dumps(record) for record in RECORDS]
    match path.suffixes:
        case [".jsonl"]:
            path.write_text("\n\n".join(lines))
        case [".json"]:
            path.write_text("[" + ",\n".join(lines) + "]\n")
        case [".json", ".gz"]:
            path.write_bytes(gzip.compress(json.dumps(RECORDS, indent=1).encode()))
        case _:
            table = pyarrow.Table.from_pylist([{**record, "other": b"\xff"} for record in RECORDS])
            pyarrow.parquet.write_table(table, path, row_group_size=30)
    return path


def read(path: Path, reader: int = 0, readers: int = 1, limit: int = 1 << 20) -> list[Any]:
    corpus = open_corpus(str(path), TOKENIZER, formats=FORMATS, reading=Reading(max_record_bytes=limit))
    return [item for block in share(corpus.blocks, reader, readers, None) for item in corpus.read(block)]


def parsed(items: list[Any]) -> list[Any]:
    return [json.loads(item.text) for item in items]


NAMES = ["a.jsonl", "a.json", "a.json.gz", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_records_are_whole_and_shared_out(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert parsed(read(path)) == RECORDS
    shares = [record for reader in range(3) for record in parsed(read(path, reader, 3))]
    assert sorted(record["completion"] for record in shares) == [record["completion"] for record in RECORDS]


PLACES = {
    "a.jsonl": "a.jsonl:3 (byte ",
    "a.json": "a.json: item 2 of its array: what",
    "a.json.gz": "item 2 of its array: what",
    "a.parquet": "a.parquet: row 1 of row group 0: what",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_record_knows_its_place(tmp_path: Path, name: str) -> None:
    document = read(write(tmp_path / name))[1]
    assert PLACES[name] in str(document.bad("what"))


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_is_too_long_is_a_bad_one(tmp_path: Path, name: str) -> None:
    items = read(write(tmp_path / name), limit=150)
    assert all(len(item.text.encode()) <= 150 for item in items if isinstance(item, Document))
    assert "dataset.max_record_bytes" in str(next(item for item in items if isinstance(item, DataError)))


def test_lines_in_a_file_called_json_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert parsed(read(tmp_path / "a.json")) == RECORDS


@pytest.mark.parametrize(
    ("text", "message"), [("[{}", "a.json:1: expected a JSON array"), ("{\n}", "one object over several lines")]
)
def test_a_json_file_of_another_kind_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises((DataError, UsageError), match=message):
        read(tmp_path / "a.json")


def test_parquet_without_such_a_column_is_told(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="expected one of the columns completion, prompt, found text"):
        read(tmp_path / "a.parquet")


SOURCE = '''
def add(a, b):
    """Add."""
    return a + b  # form feed: \x0c


class A:
    async def f(self):
        "Doc."

        await self

    def g(self):
        """Alone."""

    def h(self): return 1
'''


def test_functions_with_docstrings_are_prompts_and_bodies(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    corpus = open_corpus(str(tmp_path), TOKENIZER, formats={"python": PYTHON_FUNCTIONS})
    documents = [item for block in corpus.blocks for item in corpus.read(block)]
    assert parsed(documents) == [
        {"prompt": 'def add(a, b):\n    """Add."""\n', "completion": "    return a + b  # form feed: \x0c\n"},
        {"prompt": '    async def f(self):\n        "Doc."\n', "completion": "\n        await self\n"},
    ]
    assert str(documents[1].bad("what")).endswith("a.py:8: what")  # type: ignore[union-attr]


def test_functions_are_better_than_their_lines_in_backward_order(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    corpus = open_corpus(str(tmp_path), TOKENIZER, formats={"python": PYTHON_PREFERENCES})
    documents = [item for block in corpus.blocks for item in corpus.read(block)]
    prompt, body = '    async def f(self):\n        "Doc."\n', "\n        await self\n"
    assert parsed(documents) == [{"prompt": prompt, "chosen": body, "rejected": "        await self\n\n"}]
    assert str(documents[0].bad("what")).endswith("a.py:8: what")  # type: ignore[union-attr]


def test_both_answers_of_a_function_fit_into_a_row_of_bytes(tmp_path: Path) -> None:
    """A longer function, by a byte, is in no pair."""
    function = 'def f():\n    """Double é."""\n    x = 2\n'
    fill = SHORT - len(function.encode()) - len("    return ''\n")
    for more in (0, 1):
        (tmp_path / f"{more}.py").write_text(f"{function}    return '{'x' * (fill + more)}'\n")
    corpus = open_corpus(str(tmp_path), TOKENIZER, formats={"python": PYTHON_PREFERENCES})
    (record,) = parsed([item for block in corpus.blocks for item in corpus.read(block)])
    prompt = len(record["prompt"].encode())
    sides = [prompt + len(record[key].encode()) + 1 for key in ("chosen", "rejected")]  # and the end of a text
    assert sides == [SHORT + 1, SHORT + 1]
    assert sum(sides) - 1 <= preference_config.dataset.max_seq_len


def test_a_source_that_is_no_python_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def")
    corpus = open_corpus(str(tmp_path), TOKENIZER, formats={"python": PYTHON_FUNCTIONS})
    (item,) = corpus.read(corpus.blocks[0])
    assert isinstance(item, DataError)
