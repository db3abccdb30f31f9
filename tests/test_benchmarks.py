"""The benchmarks run and write what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu, overhead, saving, sft, step
from benchmarks.report import Result, ratios, show, write

TINY = cases.llama_config(264, 256, 32, 1, 2, 1, 64, tied=True)


def test_ratios_are_taken_round_by_round() -> None:
    rows = [Result("b", "case", name, "speed", values, "x") for name, values in (("base", [1, 2, 4]), ("other", [2, 2, 2]))]

    (ratio,) = ratios(rows, "speed", "base")

    assert (ratio.system, list(ratio.values), ratio.value) == ("other", [2, 1, 0.5], 1)


def test_what_was_not_measured_is_listed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Result("step", "all", "jax", "not installed", [], "")]

    show(rows)
    write(rows, tmp_path / "figures.jsonl")

    assert "not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.jsonl").read_text())["value"] is None


@pytest.mark.parametrize("system", ["plain torch, 8 microbatches", "transformers, own loop", "fnrecipe, 1 leaf"])
def test_systems_of_the_step_make_the_same_losses(system: str) -> None:
    batches = cases.byte_batches(3)

    losses, expected = ([float(make(batch)) for batch in batches] for make in (_step(system), _step("plain torch")))

    assert losses == pytest.approx(expected, rel=0.01)


def _step(name: str) -> Callable[[Any], Any]:
    system = step.SYSTEMS[name]
    made: Callable[[Any], Any] = import_module(f"benchmarks.peers.{system.peer}").make_step(TINY, **system.arguments)
    return made


@pytest.mark.parametrize("system", ["plain torch, eager", "fnrecipe"])
def test_the_gpu_benchmark_runs_on_the_cpu(system: str) -> None:
    rows = {metric: values for metric, values, _ in gpu.measure(system, gpu.CASES["tiny"], rounds=2)}

    assert len(rows["per second"]) == 2
    assert rows["loss of the last step"] == pytest.approx([math.log(264)], rel=0.15)  # it learns its one batch


@pytest.mark.slow
def test_fine_tuning_is_measured_by_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"instruction": f"Double {n}.", "input": "", "output": f"{2 * n} " * n} for n in range(1, 20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/alpaca_en_demo.json").write_text(json.dumps(records))
    monkeypatch.setattr(sft, "VOCABULARY", 264)
    monkeypatch.setattr(sft, "CONFIG", TINY)
    monkeypatch.setattr(sft, "LENGTH", 128)

    sft._write(tmp_path, tmp_path)
    counted, loss = next(sft.train_fnrecipe(tmp_path))

    assert 0 < counted.trained < counted.tokens <= counted.positions == 4 * 128
    assert loss == pytest.approx(math.log(264), rel=0.05)


@pytest.mark.slow
def test_a_benchmark_writes_its_figures(tmp_path: Path) -> None:
    name = "gpu"
    command = [sys.executable, "-m", "benchmarks", name, "--rounds", "1", "--json", tmp_path / "figures.jsonl"]
    uncompiled = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # a minute less; that Inductor works is not the question here
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, env=uncompiled)

    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert rows
    assert all(row.keys() == {"benchmark", "case", "system", "metric", "value", "unit"} for row in rows)
    assert all(row["benchmark"] == name and row["value"] > 0 for row in rows)


@pytest.mark.slow
def test_saves_are_measured_from_call_to_commit() -> None:
    figures = {(result.system, result.metric): result.value or 0.0 for result in saving.run(rounds=1, megabytes=2.0)}
    for system in ("fnrecipe, waiting", "fnrecipe, beside", "dcp.save", "dcp.async_save"):
        assert 0 < figures[system, "stalled"] <= figures[system, "saved"]
    assert figures["fnrecipe, waiting", "saved, ratio to dcp.save"] > 0


@pytest.mark.slow
def test_the_overhead_is_measured_beside_the_step() -> None:
    threads = torch.get_num_threads()
    try:
        figures = {result.metric: result.values for result in overhead.run(rounds=2)}
    finally:
        torch.set_num_threads(threads)

    assert [len(values) for values in figures.values()] == [2, 2, 2]
    assert all(value > 0 for values in figures.values() for value in values)
