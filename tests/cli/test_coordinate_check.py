"""`fnrecipe coordinate-check`: a table with a column for each size, a picture, and what it does not take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import assert_usage_error, fnrecipe_here
from tests.helpers import pairs


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--widths, --depths: expected one of them, found none"),
        (["--widths", "32,64", "--depths", "1,2"], "--widths, --depths: expected one of them, found both"),
        (["--widths", "32"], "--widths: expected two or more different integers of at least 1, as in 128,256,512, found 32"),
        (["--depths", "1,x"], "--depths: expected two or more different integers of at least 1"),
        (["--depths", "2,2"], "--depths: expected two or more different integers of at least 1"),
    ],
)
def test_sizes_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert_usage_error(fnrecipe_here(monkeypatch, capsys, "coordinate-check", "lm", *args), message)


def test_a_table_and_a_picture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, out = tmp_path / "a.jsonl", tmp_path / "check.svg"
    data.write_text('{"text": "a text of some length, said again and again"}\n' * 40)
    args = ["--widths", "64,32", "--steps", "2", "--out", out, "--config", *pairs(data), "trainer.jit=off"]
    ended = fnrecipe_here(monkeypatch, capsys, "coordinate-check", "lm", *args)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert "by width" in lines[1]
    assert [word.strip() for word in lines[1].strip("┃").split("┃")][1:] == ["32", "64", "slope"]
    assert sum(line.startswith("│ change of ") for line in lines) == 2
    assert out.read_text().count("<polyline") == 3 + 3 + 2 + 2
