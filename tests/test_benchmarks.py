"""The benchmarks run and write what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Result, ratios


def test_ratios_are_taken_round_by_round() -> None:
    rows = [Result("b", "case", name, "speed", values, "x") for name, values in (("base", [1, 2, 4]), ("other", [2, 2, 2]))]

    (ratio,) = ratios(rows, "speed", "base")

    assert (ratio.system, list(ratio.values), ratio.value) == ("other", [2, 1, 0.5], 1)


@pytest.mark.slow
def test_a_benchmark_writes_its_figures(tmp_path: Path) -> None:
    name = "stream"
    command = [sys.executable, "-m", "benchmarks", name, "--rounds", "1", "--json", tmp_path / "figures.jsonl"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)

    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert rows
    assert all(row.keys() == {"benchmark", "case", "system", "metric", "value", "unit"} for row in rows)
    assert all(row["benchmark"] == name and row["value"] > 0 for row in rows)
