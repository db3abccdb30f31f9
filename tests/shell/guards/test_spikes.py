"""Runs with spikes: what is left is that of a stream without the batches that were passed over, whatever stopped them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from fnrecipe import build, checkpoint
from fnrecipe.config import resolve
from fnrecipe.data import Cursor, LaneAssignment, Source, Stream, map_items, pipe
from fnrecipe.errors import CheckpointError, ConfigError, FnrecipeError, NonFiniteError, SpikeError, UsageError
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import layout
from fnrecipe.shell.guards import spikes
from tests.helpers import end, pairs, rows, signal_at, start
from tests.recipes import spiking
from tests.recipes.spiking import numbered, recipe, stream
from tests.recipes.test_regression import FAST, TRACED, results

FILE = str(Path(spiking.__file__))
SKIP = "regime.on_spike=skip", "regime.spikes.pass_over=100", "regime.spikes.max_rollbacks=10"
IGNORE = "regime.on_spike=ignore", *SKIP[1:], "regime.spikes.window=128", "regime.spikes.bound=10"
PASSED = [[7, 9], [12, 14]]
Fails = Callable[..., Any]


def train(out: Path, *pairs: str, trained: Any = recipe, with_changes: bool = False) -> Path:
    config, _ = resolve(recipe.config, (), [*FAST, *pairs])
    assert run.train(trained, config, out, with_changes=with_changes) == 0
    return out


def recorded(out: Path) -> list[dict[str, Any]]:
    return rows(out / "rollbacks.jsonl")


def log(out: Path) -> str:
    return (out / layout.log(0)).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes back twice."""
    return train(tmp_path_factory.mktemp("run") / "whole")


def without(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
    for number, entry in enumerate(source(cursor), 1):
        if not any(first <= number <= last for first, last in PASSED):
            yield entry


def test_it_is_a_run_on_a_stream_without_the_batches_that_were_passed_over(whole: Path, tmp_path: Path) -> None:
    clean = attrs.evolve(recipe, stream=lambda config, place: pipe(stream(config, place), without))
    assert results(whole) == results(train(tmp_path / "out", trained=clean))
    assert not (tmp_path / "out/rollbacks.jsonl").exists()


def test_each_rollback_is_recorded_with_its_numbers_and_documents(whole: Path) -> None:
    first, second = recorded(whole)
    assert [first["step"], first["back_to"], first["batches"], first["batch"]] == [9, 6, [7, 9], 9]
    assert [second["step"], second["back_to"], second["batches"], second["batch"]] == [11, 8, [12, 14], 14]
    assert [event["documents"] for event in (first, second)] == [["batch:9"], ["batch:14"]]
    for event in (first, second):
        assert event["loss"] > 9e5 > event["loss_limit"] > 100
        assert event["grad_norm"] > event["grad_norm_limit"]
    assert "step 9: loss 1.006e+06 was above " in log(whole)
    assert "batches 7 to 9 are passed over, and steps behind 6 made anew, going on after step 5" in log(whole)
    assert log(whole).count("first step after") == 1


@pytest.mark.parametrize(
    "changes",
    [
        ["regime.publish_metrics_every_n_steps=20"],
        ["regime.keep_last_n_checkpoints=1", "regime.checkpoint_every_n_steps=2"],
        pytest.param(["dataset.num_workers=2"], marks=pytest.mark.slow),
    ],
    ids=["rarely", "one checkpoint", "workers"],
)
def test_intervals_and_workers_change_nothing(changes: list[str], whole: Path, tmp_path: Path) -> None:
    train(tmp_path / "out", *changes)
    assert recorded(tmp_path / "out") == recorded(whole)
    for name in ("train", "valid"):
        assert (tmp_path / f"out/metrics/{name}.jsonl").read_bytes() == (whole / f"metrics/{name}.jsonl").read_bytes()
    tensors = "checkpoints/step_00000020/state_0000.safetensors"
    assert (tmp_path / "out" / tensors).read_bytes() == (whole / tensors).read_bytes()


def at_fixed_addresses(graph: Any, choose: Any) -> Callable[..., Any]:
    """A backend that refuses a state that is not where the first one was, as a CUDA graph does."""
    first: list[list[int]] = []

    def call(*inputs: Any) -> Any:
        addresses = [leaf.data_ptr() for leaf in inputs[: graph.meta["fixed"]]]
        first.append(addresses)
        assert addresses == first[0]
        return graph(*inputs)

    return call


def test_the_state_stays_where_it_is(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BACKENDS", {"trace": at_fixed_addresses})
    train(tmp_path / "out", *TRACED, "regime.recompute_every_n_steps=4")
    assert recorded(tmp_path / "out") == recorded(whole)
    assert (tmp_path / "out/metrics/train.jsonl").read_bytes() == (whole / "metrics/train.jsonl").read_bytes()


def fails_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which fails at that call before it does anything."""
    calls = iter(range(1, 1000))

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise FnrecipeError("killed")
        return function(*args, **options)

    return failing


@pytest.mark.parametrize("call", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "newest"), (checkpoint, "forget_after"), (spikes, "record"), (spikes, "restored")]
)
def test_a_run_that_is_killed_while_it_goes_back_is_the_run(
    module: Any, name: str, call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails_at(call + (name == "newest"), getattr(module, name)))
        with pytest.raises(FnrecipeError, match="killed"):
            train(tmp_path / "out")
    train(tmp_path / "out")
    assert results(tmp_path / "out") == results(whole)
    assert recorded(tmp_path / "out") == recorded(whole)


@pytest.mark.parametrize("steps", [8, 12])
def test_a_run_that_goes_on_is_the_run(steps: int, whole: Path, tmp_path: Path) -> None:
    train(tmp_path / "out", f"regime.num_steps={steps}")
    train(tmp_path / "out")
    assert recorded(tmp_path / "out") == recorded(whole)
    assert (tmp_path / "out/metrics/train.jsonl").read_bytes() == (whole / "metrics/train.jsonl").read_bytes()


def test_nothing_is_lost_if_it_cannot_go_back(tmp_path: Path) -> None:
    """Of two checkpoints the one that it would go back to is damaged."""

    def damaged(ticks: Any) -> Any:
        for tick in ticks:
            yield tick
            if tick.number == 6:
                file = tmp_path / "out/checkpoints/step_00000005/state_0000.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"?")

    watched = attrs.evolve(recipe, observers=lambda config, write: [damaged])
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        train(tmp_path / "out", "regime.checkpoint_every_n_steps=5", "regime.checkpoint_in_background=false", trained=watched)
    assert not (tmp_path / "out/rollbacks.jsonl").exists()
    assert (tmp_path / "out/checkpoints/step_00000005").exists()


def test_a_run_goes_back_to_before_it_began_to_judge(tmp_path: Path) -> None:
    out = train(tmp_path / "out", *IGNORE, "regime.num_steps=2", "regime.checkpoint_every_n_steps=2")
    train(out, "regime.spikes.pass_over=7", "regime.checkpoint_every_n_steps=20", with_changes=True)
    assert [event["back_to"] for event in recorded(out)] == [2, 0]
    assert "going on after step 2" in log(out)
    assert rows(out / "metrics/train.jsonl")[2]["train/loss_limit"] is None


def test_it_goes_back_so_often_only(tmp_path: Path) -> None:
    with pytest.raises(
        SpikeError, match=r"step 11: loss 9\.935e\+05 was above .*the run has gone back 1 times \(regime\.spikes"
    ):
        train(tmp_path / "out", "regime.spikes.max_rollbacks=1")
    assert SpikeError.exit_status == NonFiniteError.exit_status == 3


def test_a_spike_that_is_skipped_is_a_line_with_its_documents(tmp_path: Path) -> None:
    train(tmp_path / "out", *SKIP)
    events, steps = rows(tmp_path / "out/metrics/spikes.jsonl"), rows(tmp_path / "out/metrics/train.jsonl")
    assert [(event["step"], event["batch"], event["documents"]) for event in events] == [
        (9, 9, ["batch:9"]),
        (14, 14, ["batch:14"]),
    ]
    assert [row["step"] for row in steps if row["train/skipped"]] == [9, 14]
    assert events[0]["loss"] == steps[8]["train/loss"] > 9e5 > events[0]["loss_limit"] == steps[8]["train/loss_limit"]
    assert not (tmp_path / "out/rollbacks.jsonl").exists()
    before = results(tmp_path / "out")
    train(tmp_path / "again", *SKIP, "regime.num_steps=12")
    found = results(train(tmp_path / "again", *SKIP))
    names = [name for name in before if "00000020" in name or name in ("metrics/train.jsonl", "metrics/spikes.jsonl")]
    assert {name: found[name] for name in names} == {name: before[name] for name in names}


def spoiled(*numbers: int) -> Any:
    return attrs.evolve(recipe, stream=partial(stream, spoiled=numbers))


def test_many_spikes_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(SpikeError, match=r"step 11: loss .* was above .*, and 3 steps in a row were skipped \(trainer\.max_"):
        train(tmp_path / "out", *SKIP, "trainer.max_skipped_steps=3", trained=spoiled(*range(9, 14)))


def infinite(entry: tuple[int, Any]) -> Any:
    number, batch = entry
    return attrs.evolve(batch, y=np.where(number in (9, 10, 16), np.inf, batch.y).astype(np.float32))


def test_from_steps_in_a_row_that_are_not_finite_the_run_goes_back(tmp_path: Path) -> None:
    def endless(config: Any, place: Any) -> Source[Any]:
        return pipe(stream(config, place, ()), numbered, partial(map_items, function=infinite))

    train(tmp_path / "out", "trainer.max_skipped_steps=2", trained=attrs.evolve(recipe, stream=endless))
    (event,) = recorded(tmp_path / "out")
    assert (event["step"], event["batches"], event["loss"], event["skipped"]) == (10, [8, 10], None, 2)
    assert [row["batch"] for row in rows(tmp_path / "out/metrics/spikes.jsonl")] == [16]
    assert "step 10: the loss or the gradient was not finite: batches 8 to 10 are passed over" in log(tmp_path / "out")


def test_a_run_that_knows_no_documents_says_so(tmp_path: Path) -> None:
    train(tmp_path / "out", *SKIP, trained=attrs.evolve(recipe, documents=None))
    assert [row["documents"] for row in rows(tmp_path / "out/metrics/spikes.jsonl")] == [None, None]


def test_a_run_may_begin_to_judge_and_end_it(tmp_path: Path) -> None:
    out = train(tmp_path / "out", "regime.num_steps=8", *IGNORE)
    with pytest.raises(UsageError, match=r"regime\.on_spike: 'ignore' there, 'rollback' now"):
        train(out)
    train(out, *SKIP, "regime.num_steps=14", with_changes=True)
    assert "the window of steps by which spikes are judged begins empty" in log(out)
    assert [row["step"] for row in rows(out / "metrics/spikes.jsonl")] == [14]  # step 9 is among those it is judged by
    train(out, *SKIP, "regime.spikes.window=3", "regime.num_steps=16", with_changes=True)
    train(out, *IGNORE, with_changes=True)
    assert "train/spike" not in rows(out / "metrics/train.jsonl")[-1]


def test_a_run_from_before_there_was_the_key_goes_on(tmp_path: Path) -> None:
    out = train(tmp_path / "out", "regime.num_steps=5", *IGNORE)
    lines = (out / "config.yaml").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  on_spike:"))
    assert [line.split(":")[0].strip() for line in lines[start : start + 6]][1:] == [
        "spikes",
        "window",
        "bound",
        "pass_over",
        "max_rollbacks",
    ]
    (out / "config.yaml").write_text("\n".join([*lines[:start], *lines[start + 6 :]]) + "\n")
    train(out, *IGNORE)
    assert rows(out / "metrics/train.jsonl")[-1]["step"] == 20


def test_keys_that_are_not_read_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(lm.config, (), ["regime.on_spike=skip", "regime.spikes.pass_over=3", "regime.spikes.bound=5"])
    (problem,) = str(raised.value).splitlines()
    assert problem.startswith("regime.spikes.pass_over: expected 100 for regime.on_spike=skip, which does not read it, found 3")


def test_documents_are_the_lines_whose_texts_are_in_the_batch(texts: Path, tmp_path: Path) -> None:
    """With so low a bound that ordinary steps are spikes."""
    changes = {
        "regime__on_spike": "skip",
        "regime__spikes__window": 3,
        "regime__spikes__bound": 0.5,
        "trainer__max_skipped_steps": 9,
    }
    quick = {"regime__num_steps": 9, "trainer__jit": "off", "dataset__prefetch": 0, "dataset__cache": tmp_path / "cache"}
    config, _ = resolve(lm.config, (), pairs(texts, **changes, **quick))
    assert run.train(lm, config, tmp_path / "out") == 0
    events = rows(tmp_path / "out/metrics/spikes.jsonl")
    assert events
    batches = [batch for _, (batch, _) in zip(range(9), lm.stream(config, LaneAssignment())(None), strict=False)]
    for event in events:
        named = [place.rpartition(":") for place in event["documents"]]
        found = {json.loads(Path(file).read_text().splitlines()[int(line) - 1])["text"] for file, _, line in named}
        pieces = texts_of(batches[event["batch"] - 1])
        assert all(any(piece in text for text in found) for piece in pieces)
        assert all(any(piece in text for piece in pieces) for text in found)
        assert len(found) == len(named)


def texts_of(batch: Any) -> set[str]:
    """The texts of the pieces in a batch, of bytes."""
    found = set()
    for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments, strict=True):
        for number in range(segments.max() + 1):
            ids = [*tokens[segments == number], targets[segments == number][-1]]
            found.add(bytes(i for i in ids if i < 256).decode())
    return found


@pytest.mark.slow
def test_two_processes_that_are_killed_go_back_as_one(whole: Path, tmp_path: Path) -> None:
    command = "train", FILE, "--out", str(tmp_path / "out"), "--config", *FAST, "gang.sharding=fsdp", "--nproc", "2"
    assert signal_at(start(*command), tmp_path / "out", 7, signal.SIGKILL).status != 0
    ended = end(start(*command))
    assert ended.status == 0, ended.errors
    assert recorded(tmp_path / "out") == recorded(whole)
    found, expected = results(tmp_path / "out"), results(whole)
    names = [name for name in expected if name.startswith("metrics/")]
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
