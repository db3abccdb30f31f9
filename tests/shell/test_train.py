"""Whole tiny runs in this process: what is written when, and what a run goes on from."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch

from fnrecipe import checkpoint, optim, tree
from fnrecipe.config import resolve
from fnrecipe.data import pipe
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import EXIT_AGAIN, CheckpointError, DataError, FnrecipeError, NonFiniteError, UsageError
from fnrecipe.loss import Loss
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime import garbage
from fnrecipe.runtime.signals import EXIT_STATUS
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import layout
from fnrecipe.shell.recording import jsonl as record
from tests.helpers import pairs, remains, rows
from tests.shell.stages import before_batch


def train(texts: Path, out: Path, trained: Recipe[Any] = recipe, *, with_changes: bool = False, **changes: Any) -> int:
    small = {"regime__num_steps": 6, "dataset__prefetch": 0, **changes}
    config, _ = resolve(recipe.config, (), pairs(texts, **small))
    return run.train(trained, config, out, with_changes=with_changes)


def steps(out: Path, name: str = "train") -> list[int]:
    return [row["step"] for row in rows(out / f"metrics/{name}.jsonl")]


def checkpoints(out: Path) -> list[int]:
    return [int(place.name.removeprefix("step_")) for place in checkpoint.committed(out / layout.CHECKPOINTS)]


def log(out: Path) -> str:
    return (out / layout.log(0)).read_text()


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train(texts, out) == 0
    return out


def test_a_run_writes_each_step_once_and_everything_else(whole: Path) -> None:
    assert steps(whole) == [1, 2, 3, 4, 5, 6]
    assert steps(whole, "valid") == [6]
    assert checkpoints(whole) == [4, 6]
    assert {path.name for path in whole.iterdir()} >= {"config.yaml", "run.json", "sample.txt", "metrics", "logs"}
    assert "\n  jit: auto\n" in (whole / "config.yaml").read_text()  # what it stands for is up to the device
    row = rows(whole / "metrics/train.jsonl")[0]
    names = ("loss", "targets", "bytes", "grad_norm", "skipped", "lr", "bits_per_byte")
    assert row.keys() == {"step", *(f"train/{name}" for name in names)}
    assert 5.0 < row["train/loss"] < 6.0  # log(264) = 5.6 for a model that knows nothing


def test_the_speed_is_recorded_beside_what_it_costs(whole: Path) -> None:
    timed = rows(whole / "logs/perf.jsonl")
    assert [row["step"] for row in timed] == [3, 4, 6]
    row = timed[0]
    assert row["perf/positions_per_second"] == pytest.approx(8 * 32 * row["perf/steps_per_second"])
    assert row["perf/tokens_per_second"] <= row["perf/positions_per_second"]
    model = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 264 * 32
    assert row["perf/model_flops_per_second"] == pytest.approx(
        (6 * model + 12 * 2 * 32 * 32) * row["perf/positions_per_second"]
    )
    assert row["perf/causal_model_flops_per_second"] < row["perf/model_flops_per_second"]
    assert 0 <= row["perf/data_wait"] <= 1
    assert 50e6 < row["perf/peak_memory"] < 50e9
    assert "perf/mfu" not in row  # nobody knows the peak of a CPU


def test_the_time_of_a_run_counts_from_the_start_of_its_command(texts: Path, tmp_path: Path) -> None:
    config, _ = resolve(recipe.config, (), pairs(texts, regime__num_steps=4, dataset__prefetch=0, trainer__jit="off"))
    assert run.train(recipe, config, tmp_path, started=time.monotonic() - 7200) == 0
    assert "  first step after 2h00m" in log(tmp_path)
    assert "  done: step 4, 4 steps in 2h00m" in log(tmp_path)


def test_the_same_command_once_more_changes_nothing(whole: Path, texts: Path) -> None:
    before = remains(whole)
    assert train(texts, whole) == 0
    assert remains(whole) == before


def test_eager_and_traced_runs_leave_the_same_bits(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, trainer__jit="off") == 0
    eager, traced = remains(tmp_path), remains(whole)
    assert eager.pop("config.yaml") != traced.pop("config.yaml")
    assert eager == traced


@pytest.mark.parametrize(("number", "status"), EXIT_STATUS.items())
def test_a_signal_saves_the_step_that_it_came_in(
    whole: Path, texts: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    before, calls = signal.getsignal(number), count(1)

    def loss(config: Any) -> Loss:
        apply = recipe.loss(config)

        def signalled(*args: Any) -> Any:
            if next(calls) == 4:  # in the second step, of two leaves
                os.kill(os.getpid(), number)
            return apply(*args)

        return signalled

    assert train(texts, tmp_path, attrs.evolve(recipe, loss=loss), trainer__jit="off") == status
    assert signal.getsignal(number) == before
    assert checkpoints(tmp_path) == [2]
    assert steps(tmp_path) == [1, 2]
    assert log(tmp_path).splitlines()[-1].endswith(f"  {number.name}: saved step 2; the same command goes on from there")
    assert train(texts, tmp_path, trainer__jit="off") == 0
    found, expected = remains(tmp_path), remains(whole)
    assert found.pop("config.yaml") != expected.pop("config.yaml")
    assert {**found, **expected} == {**expected, **found}


def test_an_error_in_the_middle_loses_nothing_but_the_steps_since_the_last_checkpoint(
    whole: Path, texts: Path, tmp_path: Path
) -> None:
    def fail() -> None:
        raise DataError("a.jsonl:3: bad")

    with pytest.raises(DataError, match="bad"):
        train(texts, tmp_path, before_batch(6, fail))
    assert checkpoints(tmp_path) == [4]
    assert train(texts, tmp_path) == 0
    assert remains(tmp_path) == remains(whole)


@pytest.mark.parametrize("fails", [False, True])
def test_behind_the_first_step_the_collector_sees_what_is_new_and_after_a_run_all_objects(
    texts: Path, tmp_path: Path, fails: bool
) -> None:
    frozen: list[int] = []

    def look() -> None:
        frozen.append(gc.get_freeze_count() if gc.isenabled() else 0)
        if fails:
            raise DataError("a.jsonl:3: bad")

    with suppress(DataError), garbage.paused():
        train(texts, tmp_path, before_batch(3, look), trainer__jit="off", regime__num_steps=4)
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0


def test_a_validation_that_dies_is_made_up_for(texts: Path, tmp_path: Path) -> None:
    due = {"regime__validate_every_n_steps": 2, "regime__checkpoint_every_n_steps": 2}

    def broken(config: Any, place: Any) -> Source[Any]:
        def source(cursor: Cursor) -> Stream[Any]:
            raise DataError("no validation data")
            yield

        return source

    with pytest.raises(DataError):
        train(texts, tmp_path / "a", attrs.evolve(recipe, evaluations=lambda config: {"valid": Evaluation(broken)}), **due)
    assert checkpoints(tmp_path / "a") == [2]
    assert train(texts, tmp_path / "a", **due) == 0
    assert train(texts, tmp_path / "b", **due) == 0
    assert steps(tmp_path / "a", "valid") == [2, 4, 6]
    assert remains(tmp_path / "a") == remains(tmp_path / "b")


@pytest.mark.parametrize("again", [1, 2])
def test_a_validation_that_a_signal_ends_is_made_up_for(texts: Path, tmp_path: Path, again: int) -> None:
    due = {"regime__validate_every_n_steps": 2, "regime__checkpoint_every_n_steps": 4}

    def stopped(config: Any, place: Any) -> Source[Any]:
        def stage(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield from source(cursor)

        return pipe(recipe.evaluations(config)["valid"].stream(config, place), stage)

    for _ in range(again):
        assert (
            train(texts, tmp_path / "a", attrs.evolve(recipe, evaluations=lambda config: {"valid": Evaluation(stopped)}), **due)
            == EXIT_AGAIN
        )
        assert checkpoints(tmp_path / "a") == [2]
        assert not (tmp_path / "a/metrics/valid.jsonl").exists()
    assert train(texts, tmp_path / "a", **due) == 0
    assert train(texts, tmp_path / "b", **due) == 0
    found, expected = remains(tmp_path / "a"), remains(tmp_path / "b")
    assert {name: found[name] for name in expected} == expected


def test_more_steps_after_the_end_have_the_learning_rates_of_a_longer_run(whole: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    assert train(texts, out) == 0
    assert train(texts, out, regime__num_steps=12) == 0
    schedule = cosine_annealing(recipe.config.optimizer.config.lr, num_warmup_steps=3, num_steps=12, final_scale=0.1)
    rates = [row["train/lr"] for row in rows(out / "metrics/train.jsonl")]
    assert steps(out) == list(range(1, 13))
    assert rates[:6] == [row["train/lr"] for row in rows(whole / "metrics/train.jsonl")]
    assert rates[6:] == [schedule(torch.tensor(step)).item() for step in range(7, 13)]
    assert rates[6] > rates[5]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_is_kept(texts: Path, tmp_path: Path) -> None:
    hopeless = {"optimizer__config__lr": 1e30, "trainer__max_skipped_steps": 3, "regime__num_steps": 30}
    with pytest.raises(NonFiniteError, match=r"not finite in 3 steps in a row \(trainer.max_skipped_steps\)") as caught:
        train(texts, tmp_path, **hopeless)
    bad = [row["step"] for row in rows(tmp_path / "metrics/train.jsonl") if row["train/skipped"]]
    assert f"step {bad[2]}: " in str(caught.value)
    assert caught.value.exit_status == 3
    assert bad == list(range(bad[0], bad[0] + len(bad)))
    found = checkpoint.newest(tmp_path / layout.CHECKPOINTS, lambda text: None)
    assert found is None or all(leaf.isfinite().all() for leaf in found.tensors.values())


def spoilt(steps: Callable[[torch.Tensor], torch.Tensor], bounded: Any = None) -> Recipe[Any]:
    """The recipe, whose update is not finite at the steps for which `steps` holds."""

    def update(updates: Any, params: Any, step: torch.Tensor) -> Any:
        return tree.map(lambda leaf: leaf / torch.where(steps(step), 0.0, 1.0), updates), {}

    made = optim.chain(optim.stateless(update), optim.scale_by_learning_rate(lambda step: torch.tensor(1e-3)))
    return attrs.evolve(recipe, update=lambda config: attrs.evolve(made, bounded=bounded))


EVERY_STEP = {"regime__checkpoint_every_n_steps": 1, "regime__keep_last_n_checkpoints": 1, "regime__num_steps": 8}


def test_updates_that_are_not_finite_stop_the_run_and_what_was_saved_before_them_is_kept(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: the update was not finite in 4 steps in a row") as caught:
        train(texts, tmp_path, spoilt(lambda step: step > 3), trainer__max_skipped_steps=4, **EVERY_STEP)
    assert caught.value.exit_status == 3
    assert [row["train/skipped"] for row in rows(tmp_path / "metrics/train.jsonl")] == [0, 0, 0, 1, 2, 3, 4]
    assert checkpoints(tmp_path) == [3, 6]
    before, newest = (values_of(tmp_path / f"checkpoints/step_{step:08d}") for step in (3, 6))
    assert {name for name in before if not torch.equal(before[name], newest[name])} == {"step", "skipped"}


def test_what_is_older_than_skipped_steps_goes_once_a_step_is_made_again(texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, spoilt(lambda step: (step > 3) & (step < 6)), **EVERY_STEP) == 0
    assert checkpoints(tmp_path) == [8]


def test_a_state_that_is_not_finite_is_not_saved(texts: Path, tmp_path: Path) -> None:
    deceived = spoilt(lambda step: step == 3, bounded=lambda gradients, state, params, step: torch.tensor(True))
    with pytest.raises(NonFiniteError, match=r"step 3: the state, which is not saved, has .* not finite: params\.\S+"):
        train(texts, tmp_path, deceived, **EVERY_STEP)
    assert checkpoints(tmp_path) == [2]
    assert all(value.isfinite().all() for value in values_of(tmp_path / "checkpoints/step_00000002").values())


def test_a_run_does_not_begin_with_parameters_that_are_not_finite(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"^the first state has numbers that are not finite: params\.embedding, [^\n]*$"):
        train(texts, tmp_path, model__config__init_std=1e38)
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("path", ["params.layers.1.gate", "optimizer.1.square.norm"])
def test_a_run_does_not_go_on_from_a_checkpoint_that_is_not_finite(texts: Path, tmp_path: Path, path: str) -> None:
    assert train(texts, tmp_path) == 0
    place = tmp_path / "checkpoints/step_00000006"
    file = place / "state_0000.safetensors"
    values = values_of(place)
    values[path].view(-1)[5] = torch.nan
    safetensors.torch.save_file(values, file)
    old, new = (place / "SHA256SUMS").read_text().splitlines(), hashlib.sha256(file.read_bytes()).hexdigest()
    (place / "SHA256SUMS").write_text("".join(f"{new}  {file.name}\n" if file.name in line else f"{line}\n" for line in old))
    with pytest.raises(NonFiniteError, match=rf"step_00000006: the checkpoint has numbers that are not finite: {path}$"):
        train(texts, tmp_path)


def values_of(place: Path) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = safetensors.torch.load_file(place / "state_0000.safetensors")
    return values


FLOAT16 = {
    "trainer__jit": "off",
    "trainer__dtype": "float16",
    "trainer__max_skipped_steps": 1,
    "trainer__fp16_loss_scale": "[1048576, 1]",
}


def test_a_run_whose_state_is_in_half_precision_goes_on_bit_for_bit(texts: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise DataError("stop")

    pure = {"model__dtype": "bfloat16", "trainer__dtype": "bfloat16", "trainer__jit": "off"}
    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    assert train(texts, alone, **pure) == 0
    with pytest.raises(DataError):
        train(texts, stopped, before_batch(6, stop), **pure)
    assert train(texts, stopped, **pure) == 0
    assert remains(stopped) == remains(alone)
    found = checkpoint.newest(alone / layout.CHECKPOINTS, lambda text: None)
    assert found is not None
    kinds = {path.rpartition("layers")[0]: saved.dtype for path, saved in found.tensors.items() if ".layers." in path}
    assert kinds == dict.fromkeys(["params.", "optimizer.1.mean.", "optimizer.1.square."], "bfloat16")
    with pytest.raises(CheckpointError, match=r"params.norm: expected float32 \[32\], found bfloat16 \[32\]"):
        train(texts, alone, with_changes=True, **pure | {"model__dtype": "float32"})


def test_a_run_in_half_precision_looks_for_its_loss_scale_and_goes_on_with_it(texts: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise DataError("stop")

    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    assert train(texts, alone, **FLOAT16, regime__num_steps=12) == 0
    found = [(row["train/loss_scale"], row["train/grad_norm"]) for row in rows(alone / "metrics/train.jsonl")]
    lost = sum(norm is None for _, norm in found)
    assert 2 <= lost <= 8
    assert [scale for scale, _ in found] == [2.0 ** (20 - min(step, lost)) for step in range(12)]
    assert f"loss scale {found[-1][0]:g}" in log(alone)
    with pytest.raises(DataError):
        train(texts, stopped, before_batch(7, stop), **FLOAT16, regime__num_steps=12)
    assert train(texts, stopped, **FLOAT16, regime__num_steps=12) == 0
    assert remains(stopped) == remains(alone)


def test_a_run_in_half_precision_ends_at_the_minimum_of_its_loss_scale(texts: Path, tmp_path: Path) -> None:
    scales = "[1048576, 300000]"
    with pytest.raises(NonFiniteError, match=r"half the loss scale of 524288 is below the minimum of trainer.fp16_loss_scale"):
        train(texts, tmp_path, **FLOAT16 | {"trainer__fp16_loss_scale": scales})
    assert [row["train/loss_scale"] for row in rows(tmp_path / "metrics/train.jsonl")] == [2.0**20, 2.0**19, 2.0**19]


def test_the_newest_checkpoint_being_damaged_costs_only_its_steps(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path) == 0
    (tmp_path / "checkpoints/step_00000006/state.json").write_text("{}")
    assert train(texts, tmp_path) == 0
    assert "step_00000006: damaged checkpoint passed over" in log(tmp_path)
    assert "going on after step 4" in log(tmp_path)
    assert remains(tmp_path).items() >= remains(whole).items()


def test_a_checkpoint_of_another_model_is_refused_by_tensor(texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path) == 0
    wide = {"model__config__ffn_inner_dim": 32}
    with pytest.raises(UsageError, match=r"ffn_inner_dim: 64 there, 32 now"):
        train(texts, tmp_path, **wide)
    with pytest.raises(CheckpointError, match=r"params.layers.0.gate: expected float32 \[32, 32\], found float32 \[64, 32\]"):
        train(texts, tmp_path, with_changes=True, **wide)
    assert train(texts, tmp_path) == 0, "the config that fits is still the one in the directory"


def test_data_that_ends_ends_the_run_with_a_checkpoint(texts: Path, tmp_path: Path) -> None:
    changes = {"regime__num_steps": "null", "regime__num_data_epochs": 1, "lr_scheduler__config__cycle_len": 100}
    assert train(texts, tmp_path, **changes) == 0
    last = steps(tmp_path)[-1]
    assert steps(tmp_path) == list(range(1, last + 1))
    assert checkpoints(tmp_path)[-1] == last
    assert steps(tmp_path, "valid")[-1] == last
    before = remains(tmp_path)
    assert train(texts, tmp_path, **changes) == 0
    assert remains(tmp_path) == before


def test_no_data_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="expected at least one"):
        train(tmp_path, tmp_path / "out")


def test_only_so_many_checkpoints_are_kept(texts: Path, tmp_path: Path) -> None:
    changes = {
        "regime__checkpoint_every_n_steps": 1,
        "regime__keep_last_n_checkpoints": 2,
        "regime__validate_every_n_steps": "null",
    }
    assert train(texts, tmp_path, attrs.evolve(recipe, evaluations=lambda config: {}, sample=None), **changes) == 0
    assert checkpoints(tmp_path) == [5, 6]


def test_prefetching_changes_nothing(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, dataset__prefetch=3) == 0
    found, expected = remains(tmp_path), remains(whole)
    assert found.pop("config.yaml") != expected.pop("config.yaml")
    assert found == expected


def test_a_full_disk_under_the_metrics_is_an_error_for_its_user(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(FnrecipeError, match="No space left on device"):
        train(texts, tmp_path)
