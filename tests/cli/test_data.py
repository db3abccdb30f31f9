"""`fnrecipe data`: what it shows is what a run trains on, and its numbers are those of a slow count."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import attrs
import numpy as np
import pytest

from fnrecipe.config import resolve
from fnrecipe.data import Document, LaneAssignment, held_out
from fnrecipe.recipes.lm.config import config
from fnrecipe.recipes.lm.data import train_stream
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here
from tests.helpers import WORDS

LENGTH = 200
SECTION = "dataset={max_seq_len: 200, batch_size: 8, num_lanes: 4, pack_window: 16, valid_fraction: 0.2}"
BAD = "{'text': 3}\n"
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, JSONL and text between blank lines, and a third with two bad records."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    plain, accented = ([" ".join(draw.choices(words, k=draw.randint(1, 50))) for _ in range(90)] for words in (WORDS, "äöü€x"))
    lines = [json.dumps({"text": text}) + "\n" for text in plain]
    (root / "plain.jsonl").write_text("".join(lines))
    (root / "accents.txt").write_text("\n\n".join(accented), encoding="utf-8")
    (root / "bad.jsonl").write_text("".join([*lines[:9], BAD, *lines[9:60], BAD, *lines[60:]]))
    return root


def texts(folder: Path, name: str) -> list[str]:
    if name == "accents":
        return (folder / "accents.txt").read_text(encoding="utf-8").split("\n\n")
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines() if f"{line}\n" != BAD]


def options(folder: Path, *pairs: str) -> list[str]:
    source = f'{{path: {folder}/accents.txt, separator: "\\n\\n"}}'
    return ["lm", "--config", SECTION, f"dataset.sources=[{{path: {folder}/plain.jsonl}}, {source}]", *pairs]


@pytest.fixture
def data(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`fnrecipe data WHAT ARGS` of both sources, in this process."""

    def data(what: str, *args: str, pairs: Sequence[str] = ()) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, "data", what, *args, *options(folder, *pairs))

    return data


# Rows as text.


@attrs.frozen
class Row:
    """A row as it is shown: its header's numbers, and source, number of targets and text of its pieces."""

    numbers: tuple[int, ...]
    pieces: list[tuple[str, int, str]]


def shown(output: str) -> list[Row]:
    headers = re.findall(r"^row (\d+): (\d+) of (\d+) positions in (\d+) pieces?$", output, re.MULTILINE)
    bodies = re.split(r"^row .*\n", output, flags=re.MULTILINE)[1:]
    pieces = [re.findall(r"^── (\w+), (\d+) targets\n((?:(?!── ).*\n)*)", body, re.MULTILINE) for body in bodies]
    return [
        Row(tuple(map(int, header)), [(name, int(count), text.removesuffix("\n")) for name, count, text in found])
        for header, found in zip(headers, pieces, strict=True)
    ]


@pytest.mark.parametrize("valid", [False, True])
def test_rows_are_shown_with_their_pieces_of_the_split_asked_for(folder: Path, data: Run, valid: bool) -> None:
    ended = data("show", "--rows", "10", *(["--valid"] if valid else []))
    assert (ended.status, ended.err) == (0, "")
    rows = shown(ended.out)
    assert [row.numbers[0] for row in rows] == [*range(8), 0, 1]
    pieces = [piece for row in rows for piece in row.pieces]
    assert {name for name, _, _ in pieces} == {"plain", "accents"}
    for row in rows:
        assert row.numbers[1:] == (sum(count for _, count, _ in row.pieces), LENGTH, len(row.pieces))
    for name, count, text in pieces:
        of_split = [text for text in texts(folder, name) if held_out(Document(text), 0.2) == valid]
        assert any(text.strip("�") in document for document in of_split)
        if "�" not in text:
            assert count - len(text.encode()) in ([1] if text in of_split else [0, -1])
    assert sum(text in texts(folder, name) for name, _, text in pieces) > len(pieces) / 2


def test_four_rows_are_shown_unless_told_and_each_as_it_is_in_the_batch(folder: Path, data: Run) -> None:
    rows = shown(data("show").out)
    batch, _ = next(train_stream(resolve(config, pairs=options(folder)[2:])[0], LaneAssignment())(None))
    assert len(rows) == 4
    for number, row in enumerate(rows):
        for place, (name, count, text) in enumerate(row.pieces):
            here = batch.segments[number] == place
            ids = [*batch.tokens[number][here], batch.targets[number][here][-1]]
            assert text == bytes(i for i in ids if i < 256).decode(errors="replace")
            assert (name, count) == (("plain", "accents")[batch.sources[number][here][0]], here.sum())


def test_fewer_rows_than_asked_for_are_shown_as_they_are(data: Run) -> None:
    ended = data("show", "--rows", "1000", "--valid")
    assert ended.status == 0
    assert 8 <= len(shown(ended.out)) < 1000


def on_a_terminal(*args: str, cwd: Path) -> str:
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "fnrecipe.cli", *args], stdout=follower, stderr=follower, cwd=cwd) as process:
        os.close(follower)
        written = b""
        with suppress(OSError):  # the end of a terminal is an error
            while part := os.read(leader, 1 << 16):
                written += part
        os.close(leader)
        assert process.wait(timeout=60) == 0
    return written.decode().replace("\r\n", "\n")


def test_colours_are_for_terminals_alone(folder: Path) -> None:
    args = ["data", "show", "--rows", "3", *options(folder)]
    plain, coloured = fnrecipe(*args, cwd=Path.cwd()), on_a_terminal(*args, cwd=Path.cwd())
    assert (plain.status, plain.err) == (0, "")
    assert "\x1b" not in plain.out
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain.out
    assert {"\x1b[36m", "\x1b[33m"} <= set(re.findall(r"\x1b\[\d+m", coloured))


# Counts.


def table(output: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


def counted(folder: Path, name: str, file: str, limit: int | None = None, bad: int = 0) -> list[str]:
    """The cells of a source's line by a slow count."""
    sizes = sorted(len(text.encode()) for text in texts(folder, name)[:limit])
    middle, high = (np.percentile(sizes, percent) for percent in (50, 90))
    size = (folder / file).stat().st_size
    lengths = [f"{value:,.0f}" for value in (middle, high, sizes[-1])]
    longer = f"{100 * sum(size > LENGTH for size in sizes) / len(sizes):.1f}%"
    return ["1", f"{size / 1000:,.1f} kB", f"{len(sizes)}", f"{bad}", f"{sum(sizes):,}", "1.00", *lengths, longer]


@pytest.mark.parametrize("limit", [None, 7])
def test_the_numbers_of_each_source_are_those_of_a_slow_count(folder: Path, data: Run, limit: int | None) -> None:
    ended = data("stats", "--batches", "1", *(["--documents", str(limit)] if limit else []))
    assert (ended.status, ended.err) == (0, "")
    found = table(ended.out)
    assert found.keys() == {"plain", "accents"}
    assert found["plain"] == counted(folder, "plain", "plain.jsonl", limit)
    assert found["accents"] == counted(folder, "accents", "accents.txt", limit)


def measured(output: str) -> tuple[int, float, float]:
    line = re.search(r"^([\d,]+) rows: ([\d.]+) pieces a row, ([\d.]+)% padding; [\d,]+ tokens/s", output, re.MULTILINE)
    assert line, output
    return int(line[1].replace(",", "")), float(line[2]), float(line[3])


def test_pieces_and_padding_are_those_of_the_batches(folder: Path, data: Run) -> None:
    rows, pieces, padding = measured(data("stats", "--batches", "3").out)
    source = train_stream(resolve(config, pairs=options(folder)[2:])[0], LaneAssignment())
    batches = [batch for batch, _ in islice(source(None), 3)]
    assert rows == 24
    assert padding == round(
        100 * float(np.mean([batch.tokens[batch.segments < 0].size / (8 * LENGTH) for batch in batches])), 2
    )
    assert pieces == round(sum(len(set(row) - {-1}) for batch in batches for row in batch.segments.tolist()) / 24, 1)


def test_validation_rows_hold_all_validation_documents_once(folder: Path, data: Run) -> None:
    rows, _, padding = measured(data("stats", "--valid").out)
    valid = [text for name in ("plain", "accents") for text in texts(folder, name) if held_out(Document(text), 0.2)]
    assert valid
    assert rows % 8 == 0
    assert padding == round(100 * (1 - sum(len(text.encode()) + 1 for text in valid) / (rows * LENGTH)), 2)


@pytest.mark.parametrize(("limit", "status"), [(2, 0), (0, 1)])
def test_bad_records_are_counted_and_each_is_named_once(folder: Path, limit: int, status: int) -> None:
    pairs = [f"dataset.sources=[{{path: {folder}/bad.jsonl}}]", f"dataset.max_bad_records={limit}"]
    ended = fnrecipe("data", "stats", "--batches", "60", "lm", "--config", SECTION, *pairs, cwd=folder)
    assert ended.status == status
    assert table(ended.out)["bad"] == counted(folder, "bad", "bad.jsonl", bad=2)
    named = [line for line in ended.err.splitlines() if line.startswith("bad record: ")]
    assert [line.partition(" (byte")[0] for line in named] == [f"bad record: {folder}/bad.jsonl:{n}" for n in (10, 62)]
    assert ended.err.count("bad.jsonl:") == 2 + (status != 0)


# The cache.


def entries(cache: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}


def test_what_is_in_the_cache_is_only_read(folder: Path, data: Run, tmp_path: Path) -> None:
    cache = tmp_path / "deep/tokens"
    first = data("cache", pairs=[f"dataset.cache={cache}"])
    assert (first.status, first.err) == (0, "")
    blocks = [int(number) for number in re.findall(r"^\w+: 90 documents in (\d+) blocks$", first.out, re.MULTILINE)]
    assert len(blocks) == 2
    assert re.search(rf"^{cache}: [\d.]+ kB after [\d.]+ s$", first.out, re.MULTILINE)
    before = entries(cache)
    assert {Path(path).suffix for path in before} == {".safetensors"}
    assert len(before) <= sum(blocks)
    again = data("cache", pairs=[f"dataset.cache={cache}"])
    assert again.out.splitlines()[:2] == first.out.splitlines()[:2]
    for what in ("show", "stats"):
        assert data(what, pairs=[f"dataset.cache={cache}"]).status == 0
    assert entries(cache) == before
    lost = min(before)
    Path(lost).unlink()
    assert data("cache", pairs=[f"dataset.cache={cache}"]).status == 0
    after = entries(cache)
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [lost]


def test_rows_from_the_cache_are_those_from_the_text(data: Run, tmp_path: Path) -> None:
    pairs = [f"dataset.cache={tmp_path}"]
    expected = data("show", "--rows", "20")
    assert data("show", "--rows", "20", pairs=pairs) == expected, "an empty cache"
    assert data("cache", pairs=pairs).status == 0
    assert data("show", "--rows", "20", pairs=pairs) == expected, "a full one"


# What can be wrong.


@pytest.mark.parametrize(
    ("what", "pairs", "messages"),
    [
        (["cache"], [], ["dataset.cache: expected a folder for the tokens, found null (--config dataset.cache=DIR)"]),
        (["cache"], ["dataset.cache=/proc/none"], ["dataset.cache: cannot write to /proc/none/"]),
        (["show", "--valid"], ["dataset.valid_fraction=0"], ["dataset: expected at least one row, found none"]),
        (["show", "--rows", "0"], [], ["Invalid value for '--rows': 0"]),
        (["stats", "--documents", "0"], [], ["Invalid value for '--documents': 0"]),
        (["stats", "--batches", "0"], [], ["Invalid value for '--batches': 0"]),
        (["show"], ["dataset.sources=[{path: none.jsonl}]"], ["none.jsonl: expected data, found no file"]),
        (["show"], ["dataset.sources=[]", "lr=1"], ["lr: expected a known key", "did you mean optimizer.config.lr?"]),
        (["stats"], ["model.config.vocab_size=9"], ["model.config.vocab_size: expected at least the tokenizer's 257, found 9"]),
    ],
)
def test_wrong_usage_is_told(data: Run, what: list[str], pairs: list[str], messages: list[str]) -> None:
    assert_usage_error(data(*what, pairs=pairs), *messages)


def test_no_rows_to_measure_is_told_after_the_counts(data: Run) -> None:
    ended = data("stats", "--valid", pairs=["dataset.valid_fraction=0"])
    assert ended.status == 2
    assert table(ended.out).keys() == {"plain", "accents"}
    assert ended.err.startswith("error: dataset: expected at least one row, found none: each document is empty")


PLAIN = """
import attrs
from fnrecipe.recipes.lm.train import recipe as lm

recipe = attrs.evolve(lm, {change})
"""


@pytest.mark.parametrize(
    ("change", "lacks", "what"),
    [
        ("corpora=None", "corpora", ["stats"]),
        ("tokenizer=None", "tokenizer", ["show"]),
        ("evaluations=lambda config: {}", "evaluations['valid']", ["show", "--valid"]),
        ("corpora=None", "corpora", ["cache"]),
    ],
)
def test_a_recipe_that_lacks_what_is_needed_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    lacks: str,
    what: list[str],
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLAIN.format(change=change))
    ended = fnrecipe_here(monkeypatch, capsys, "data", *what, path, "--config", SECTION, f"dataset.cache={tmp_path}")
    assert_usage_error(ended, f"error: lm: this recipe has no `{lacks}`, which `fnrecipe data` needs")


@pytest.mark.parametrize("args", [["show", "lmm"], ["stats"], ["cache", "none.py"], ["shwo", "lm"]])
def test_an_unknown_recipe_or_command_is_told(tmp_path: Path, args: list[str]) -> None:
    assert_usage_error(fnrecipe("data", *args, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
