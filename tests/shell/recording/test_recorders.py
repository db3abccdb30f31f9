"""Recorders: each number once, by the field's names, whatever was killed and started again in between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe.config import MetricRecordersSection, TensorBoardSection, WandbSection, resolve
from fnrecipe.errors import UsageError
from fnrecipe.observe import Observer, Ticks
from fnrecipe.recipe import Row, Write
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell.recording import tensorboard as tensorboard_module
from fnrecipe.shell.recording import wandb as wandb_module
from fnrecipe.shell.recording.recorders import recorders_of, recording
from fnrecipe.shell.recording.tensorboard import to_tensorboard
from fnrecipe.shell.recording.wandb import to_wandb
from fnrecipe.shell.train import train
from tests.helpers import pairs, rows

OFFLINE = WandbSection(enabled=True, mode="offline")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def numbered(kind: str, *steps: int) -> list[Row]:
    return [{"step": step, f"{kind}/loss": float(step)} for step in steps]


def test_tensorboard_shows_each_step_once_when_a_run_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    with to_tensorboard(tmp_path, 0) as write:
        write("train", numbered("train", 1, 2, 3, 4))
        write("valid", numbered("valid", 4))
    with to_tensorboard(tmp_path, 2) as write:
        write("train", numbered("train", 3, 4, 5))
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(step, float(step)) for step in (1, 2, 3, 4, 5)]


def test_wandb_gets_each_step_once_offline_and_keeps_its_run(tmp_path: Path) -> None:
    with to_wandb(tmp_path, 0, section=OFFLINE, config={"a": {"b": 1}}) as write:
        write("train", numbered("train", 1, 2, 3))
        write("valid", numbered("valid", 3))
    first = json.loads((tmp_path / "wandb.json").read_text())
    time.sleep(1.1)  # a run offline is called by the second in which it begins
    with to_wandb(tmp_path, 2, section=OFFLINE, config={"a": {"b": 1}}) as write:
        write("train", numbered("train", 3, 4))
    second = json.loads((tmp_path / "wandb.json").read_text())
    assert first["id"] == second["id"]
    assert (first["sent"], second["sent"]) == ({"train": 3, "valid": 3}, {"train": 4, "valid": 3})
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first['id']}"))) == 2
    sent = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert b"train/loss" in sent
    assert b"HOME" not in sent  # nothing of the environment


@pytest.mark.parametrize(
    ("module", "section", "expected"),
    [
        (tensorboard_module, MetricRecordersSection(tensorboard=TensorBoardSection(enabled=True)), "tensorboard"),
        (wandb_module, MetricRecordersSection(TensorBoardSection(enabled=False), OFFLINE), "wandb"),
    ],
)
def test_a_package_that_is_not_there_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, section: MetricRecordersSection, expected: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    recorders = recorders_of(section, {})
    told = pytest.raises(UsageError, match=rf"metric_recorders\.{expected}\.enabled: .*'fnrecipe\[{expected}\]'")
    with told, recording(recorders, tmp_path, 0):
        pass


def test_tensorboard_is_on_where_it_is_installed_and_off_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recorders_of(MetricRecordersSection(), {})) == 2
    monkeypatch.setattr(tensorboard_module, "find_spec", lambda name: None)
    assert len(recorders_of(MetricRecordersSection(), {})) == 1


@contextmanager
def to_csv(out: Path, step: int) -> Iterator[Write]:  # a user's own recorder
    with (out / "loss.csv").open("a", encoding="utf-8") as file:

        def write(kind: str, rows: Sequence[Row]) -> None:
            for row in rows:
                if kind == "train":
                    file.write(f"{row['step']},{row['train/loss']}\n")

        yield write


def watched(config: Any, write: Write) -> Sequence[Observer]:
    def weights(ticks: Ticks) -> Ticks:  # a user's own observer
        for tick in ticks:
            if tick.metrics is not None:
                write("probe", [{"step": tick.number, "probe/embedding": tick.state.params["embedding"].local.norm().item()}])
            yield tick

    return [weights]


def test_a_run_is_recorded_by_all_recorders_and_observers(texts: Path, tmp_path: Path) -> None:
    changes = {
        "common__metric_recorders__tensorboard__enabled": "true",
        "trainer__jit": "off",
        "lr_scheduler__config__num_warmup_steps": 1,
    }
    mine = attrs.evolve(recipe, recorders=lambda config: [to_csv], observers=watched)
    for num_steps in (3, 5):  # the second run goes on from the first one
        config, _ = resolve(
            recipe.config, (), pairs(texts, regime__num_steps=num_steps, regime__checkpoint_every_n_steps=2, **changes)
        )
        assert train(mine, config, tmp_path) == 0
    training = rows(tmp_path / "metrics/train.jsonl")
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(row["step"], pytest.approx(row["train/loss"], rel=1e-6)) for row in training]
    assert {"train/lr", "train/grad_norm", "perf/tokens_per_second", "valid/loss", "valid/bits_per_byte"} <= found.keys()
    assert (tmp_path / "loss.csv").read_text().splitlines() == [f"{row['step']},{row['train/loss']}" for row in training]
    probes = rows(tmp_path / "metrics/probe.jsonl")
    assert [row["step"] for row in probes] == [1, 2, 3, 4, 5]
    assert all(row["probe/embedding"] > 0 for row in probes)
