"""The shell under a recipe that is no language model: all that it does for one, it does for any batch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fnrecipe import random, tree
from fnrecipe.build import to_host
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.inspect.graph import source, trace_step
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell import train as run
from tests.data.laws import check_resumes
from tests.helpers import end, rows, signal_at, start
from tests.recipes import regression
from tests.recipes.regression import recipe

FILE = str(Path(regression.__file__))
QUIET = "common.torch.num_threads=1", "common.metric_recorders.tensorboard.enabled=false"
FAST = "trainer.jit=off", *QUIET
TRACED = "trainer.jit=trace", *QUIET


def train(out: Path, *pairs: str) -> Path:
    config, _ = resolve(recipe.config, (), [*FAST, *pairs])
    assert run.train(recipe, config, out) == 0
    return out


def results(out: Path) -> dict[str, bytes]:
    """What a run leaves that neither processes nor kills may change."""
    paths = [path for folder in ("checkpoints", "metrics") for path in (out / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "whole")


def test_it_learns_and_is_validated(whole: Path) -> None:
    steps, validated = rows(whole / "metrics/train.jsonl"), rows(whole / "metrics/valid.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["train/targets"] for row in steps] == [8] * 10 + [4] * 10, "half of the readers end after ten steps"
    assert [row["valid/targets"] for row in validated] == [16, 16]
    assert validated[1]["valid/loss"] < validated[0]["valid/loss"]


def test_the_loss_is_that_of_numpy(whole: Path) -> None:
    """Of the first step, whose parameters are the initial ones."""
    key = random.fold_in(random.key(recipe.config.common.seed), "init")
    params = {name: leaf.numpy() for name, leaf in recipe.init(recipe.config, key, lambda path, leaf: leaf).items()}
    batch, _ = next(recipe.stream(recipe.config, LaneAssignment())(None))
    mean = np.square(batch.x @ params["weight"] + params["bias"] - batch.y).mean()
    assert rows(whole / "metrics/train.jsonl")[0]["train/loss"] == pytest.approx(float(mean), rel=1e-5)


def test_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert results(train(tmp_path / "out", "dataset.num_workers=2")) == results(whole)


def test_a_run_that_goes_on_is_the_run(whole: Path, tmp_path: Path) -> None:
    train(tmp_path / "out", "regime.num_steps=13", "dataset.num_workers=4")
    found, expected = results(train(tmp_path / "out")), results(whole)
    names = [name for name in expected if "00000020/" in name or name == "metrics/train.jsonl"]
    assert len(names) > 3
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_its_stream_resumes_at_every_item(world_size: int) -> None:
    for rank in range(world_size):
        check_resumes(recipe.stream(recipe.config, LaneAssignment(rank, world_size)), limit=15)


@pytest.mark.parametrize(("made", "count"), [(recipe, 3), (lm, 8)])
def test_rows_of_the_example_add_nothing(made: Any, count: int) -> None:
    config = made.config
    batch = to_host(made.example(config, count), torch.device("cpu"))
    assert {len(leaf) for leaf in tree.leaves(batch)} == {count}
    params = made.init(config, torch.zeros(2, dtype=torch.int64), lambda path, leaf: leaf)
    gradient, sums = torch.func.grad(made.loss(config), has_aux=True)(params, batch, None)
    assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(sums, 0)
    assert not any(leaf.any() for leaf in tree.leaves(gradient))


def test_the_graph_names_its_batch() -> None:
    code = source(recipe, trace_step(recipe, recipe.config, torch.device("cpu")))
    assert 'batch_x: "f32[8, 128]"' in code


def test_its_speed_is_counted_in_rows(whole: Path) -> None:
    for row in rows(whole / "logs/perf.jsonl"):
        assert row["perf/positions_per_second"] == pytest.approx(8 * row["perf/steps_per_second"])
        assert row["perf/model_flops_per_second"] == pytest.approx(6 * 128 * row["perf/positions_per_second"])


@pytest.mark.slow
def test_the_graph_is_told_in_rows() -> None:
    ended = end(start("graph", FILE))
    assert (ended.status, ended.errors) == (0, "")
    assert "a step of regression on cpu: 8 rows of 1 position in 8 microbatches\n" in ended.output
    assert "\nmodel: 6.1 kFLOP, " in ended.output


@pytest.mark.slow
def test_the_profile_shows_it(tmp_path: Path) -> None:
    ended = end(start("profile", FILE, "--out", str(tmp_path / "out"), "--steps", "2"))
    assert (ended.status, (tmp_path / "out/trace.json").exists()) == (0, True)
    assert "attention" not in ended.output


@pytest.mark.slow
def test_two_processes_killed_on_the_way_end_as_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    often = "regime.publish_metrics_every_n_steps=1"
    assert end(start("train", FILE, "--out", str(whole), "--config", *TRACED, often)).status == 0
    command = "train", FILE, "--out", str(killed), "--config", *TRACED, often, "gang.sharding=fsdp"
    assert signal_at(start(*command, "--nproc", "2"), killed, 7, signal.SIGKILL).status != 0
    ended = end(start(*command, "dataset.num_workers=2", "--nproc", "2"))
    assert ended.status == 0, ended.errors
    found, expected = results(killed), results(whole)
    names = [name for name in expected if name.startswith("metrics/")]  # its checkpoints have two files of tensors
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
