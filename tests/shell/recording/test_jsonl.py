"""Records: whole lines of JSON, and each step once."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fnrecipe.shell.recording import jsonl as record
from tests.helpers import rows

NUMBERS = st.floats() | st.integers(-(2**70), 2**70)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), NUMBERS, max_size=4), max_size=8)


def numbered(extra: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "step": number} for number, row in enumerate(extra, 1)]


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


@given(ROWS, st.integers(0, 8))
def test_every_line_is_json_and_numbers_come_back(extra: list[dict[str, Any]], cut: int) -> None:
    given_rows = numbered(extra)
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "train.jsonl"
        record.append(path, given_rows[:cut])
        record.append(path, given_rows[cut:])
        text = path.read_text()
    assert text == "" or text.endswith("\n")
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert found == [{name: finite(value) for name, value in row.items()} for row in given_rows]


GARBAGE = [b"", b"{", b"\n", b"\xff\xfe", b"null\n", b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 400 + b"}\n"]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**20), st.sampled_from(GARBAGE))
@example(3, 3, -2, b"")  # nothing but the last line's end is cut off
def test_rewind_drops_later_and_torn_lines_and_nothing_else(number: int, step: int, cut: int, garbage: bytes) -> None:
    lines = [json.dumps({"step": i, "loss": i / 7}).encode() + b"\n" for i in range(1, number + 1)]
    whole = b"".join(lines)
    torn = whole[: cut % (len(whole) + 1)] + garbage
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "train.jsonl"
        path.write_bytes(torn)
        record.rewind(path, step)
        found = path.read_bytes().splitlines(keepends=True)
        assert found == [line for line in lines[:step] if torn.startswith(b"".join(lines[: lines.index(line) + 1]))]
        assert record.last_step(path) == (len(found) or -1)
        record.append(path, [{"step": i} for i in range(len(found) + 1, 15)])
        assert [row["step"] for row in rows(path)] == list(range(1, 15))


def test_rewinding_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    record.rewind(tmp_path / "train.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
    assert record.last_step(tmp_path / "train.jsonl") == -1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "train.jsonl"
    record.append(path, [{"step": 1, "loss": value}])
    assert path.read_text() == '{"step": 1, "loss": null}\n'
