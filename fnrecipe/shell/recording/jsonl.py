"""The records of a run: JSON lines, one for each step, each step once, whatever was killed and started again in between."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fnrecipe.recipe import Row, Write
from fnrecipe.runtime.files import make_folder, replace, sync

METRICS, SAMPLES, PERF = "metrics", "samples", "logs/perf.jsonl"


@contextmanager
def to_jsonl(out: Path, step: int) -> Iterator[Write]:
    """Writes rows of a kind to `metrics/KIND.jsonl`; those of "perf", which differ from run to run, to `logs/perf.jsonl`."""
    for path in (out / PERF, *(path for folder in (METRICS, SAMPLES) for path in sorted((out / folder).glob("*.jsonl")))):
        rewind(path, step)

    def write(kind: str, rows: Sequence[Row]) -> None:
        append(path_of(out, kind), rows)

    yield write


def path_of(out: Path, kind: str) -> Path:
    """Where the rows of a kind are."""
    return out / PERF if kind == "perf" else out / METRICS / f"{kind}.jsonl"


def texts_of(out: Path, name: str) -> Path:
    """Where the texts of an evaluation are."""
    return out / SAMPLES / f"{name}.jsonl"


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Adds one line a row and syncs the file to disk; a number that is not finite becomes null."""
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def keep_texts(path: Path, step: int, texts: Sequence[Mapping[str, str | int]]) -> None:
    """Writes one line a text of a step behind those of earlier steps, all of them or none."""
    make_folder(path.parent)
    before = [line for line in (path.read_bytes() if path.exists() else b"").splitlines(keepends=True) if _step(line) < step]
    new = [json.dumps({"step": step, **text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    replace(path, b"".join([*before, *new]))


def rewind(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a line that was cut off."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= step]
    replace(path, b"".join(kept))


def last_step(path: Path) -> int:
    """The step of the last whole line; -1 if there is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [_step(line) for line in lines]
    return max((int(step) for step in steps if math.isfinite(step)), default=-1)


def found_in(path: Path) -> list[dict[str, float | None]]:
    """The rows of a file, without a line that is being written or was cut off; none where there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(_step(line))]


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
