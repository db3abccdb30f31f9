"""Losses of whole runs with all their digits, and the digest of a stream: what no move or renaming may change.

`python -m tests.test_goldens` writes them down anew, after a change that is meant to change them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.data.stream import reading
from fnrecipe.recipes.lm.config import config
from fnrecipe.recipes.lm.data import train_stream

from .helpers import end, pairs, rows, start, write_texts

GOLDENS = Path(__file__).with_name("goldens.json")
HALF = {"model__dtype": "bfloat16", "trainer__dtype": "bfloat16"}
RECOMPUTED = {
    "dataset__attention": "row",
    "dataset__packing": "concat",
    "trainer__activation_checkpointing__mode": "layerwise",
    "trainer__max_grad_norm": "null",
}
SHARDED = {"gang__sharding": "fsdp"}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "float32": (1, {}),
    "float32, two ranks": (2, SHARDED),
    "bfloat16": (1, HALF),
    "float16, two ranks": (2, {"trainer__dtype": "float16", "gang__sharding": "zero2"}),
    "recomputed": (1, RECOMPUTED),
    "eager": (1, {"trainer__jit": "off"}),
}


def machine() -> str:
    """What decides about the last digits: the processor and torch."""
    lines = re.findall(r"^(?:cpu family|model|model name|stepping)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return ", ".join([*lines[:4], torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"])


def losses(root: Path, ranks: int, changes: dict[str, Any]) -> dict[str, list[float]]:
    """What a run of 12 steps records: training and validation losses, and norms of gradients."""
    write_texts(root / "texts")
    values = pairs(root / "texts", **{"regime__num_steps": 12, **changes})
    processes = ["--nproc", str(ranks)] if ranks > 1 else []
    done = end(start("train", "lm", "--out", str(root / "out"), *processes, "--config", *values))
    assert done.status == 0, done.errors
    training, validation = (rows(root / f"out/metrics/{name}.jsonl") for name in ("train", "valid"))
    return {
        "loss": [row["train/loss"] for row in training],
        "gradient_norm": [row["train/grad_norm"] for row in training],
        "validation": [row["valid/loss"] for row in validation],
    }


def digest(root: Path) -> str:
    """Of the first 40 batches and their cursors: the same on every machine."""
    write_texts(root / "texts")
    changed, _ = resolve(config, pairs=pairs(root / "texts"))
    found = hashlib.sha256()
    with reading(train_stream(changed, LaneAssignment())(None)) as stream:
        for batch, cursor in islice(stream, 40):
            for field in attrs.fields(type(batch)):
                found.update(getattr(batch, field.name).tobytes())
            found.update(json.dumps(cursor).encode())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_that_were_written_down(name: str, tmp_path: Path) -> None:
    goldens = json.loads(GOLDENS.read_text())
    found = losses(tmp_path, *RUNS[name])
    if machine() == goldens["machine"]:
        assert found == goldens["losses"][name]
    else:
        tolerance = 0.05 if "16" in name else 1e-3  # another processor adds up in another order
        assert found == {key: pytest.approx(values, rel=tolerance) for key, values in goldens["losses"][name].items()}


def test_the_stream_is_the_one_that_was_written_down(tmp_path: Path) -> None:
    assert digest(tmp_path) == json.loads(GOLDENS.read_text())["stream"]


def test_ranks_and_tracing_change_no_golden() -> None:
    found = json.loads(GOLDENS.read_text())["losses"]
    assert found["float32"] == found["float32, two ranks"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / str(number) for number, name in enumerate(["stream", *RUNS])}
        for root in roots.values():
            root.mkdir()
        written = {name: losses(roots[name], *run) for name, run in RUNS.items()}
        stream = digest(roots["stream"])
    GOLDENS.write_text(json.dumps({"machine": machine(), "stream": stream, "losses": written}, indent=1) + "\n")
    sys.stdout.write(GOLDENS.read_text())
