"""Whole tiny runs and their data: what may change between two runs, bad records, several sources, workers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.config import resolve
from fnrecipe.data import Document, LaneAssignment, held_out
from fnrecipe.errors import DataError, UsageError
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.signals import EXIT_STATUS
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import layout
from tests.helpers import Ended, end, last_step, pairs, remains, rows, start
from tests.shell.stages import before_batch

SMALL = {"regime__num_steps": 6, "dataset__prefetch": 0, "trainer__jit": "off"}
FOREVER = {**SMALL, "regime__num_steps": 10**6, "regime__publish_metrics_every_n_steps": 1, "dataset__num_workers": 2}
EPOCH = {"regime__num_steps": "null", "regime__num_data_epochs": 1, "lr_scheduler__config__cycle_len": 100}


def train(texts: Path, out: Path, *, with_changes: bool = False, **changes: Any) -> int:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))
    return run.train(recipe, config, out, with_changes=with_changes)


def log(out: Path) -> str:
    return (out / layout.log(0)).read_text()


def results(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in remains(out).items() if name != "config.yaml"}


def metrics(out: Path, name: str = "train") -> list[dict[str, Any]]:
    return rows(out / f"metrics/{name}.jsonl")


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 4 and 6."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train(texts, out) == 0
    return out


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """The folder is afterwards what it was before."""
    copy = folder.with_suffix(".copy")
    shutil.copytree(folder, copy)
    yield
    shutil.rmtree(folder)
    copy.rename(folder)


# What may change between two runs in a directory.


def test_a_file_that_changes_under_a_run_is_named_once_and_going_on_is_refused(texts: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(texts, data)

    def change() -> None:
        content = (data / "a.jsonl").read_bytes()
        (data / "a.jsonl").write_bytes(content.replace(b"fold", b"gold", 1))

    config, _ = resolve(recipe.config, (), pairs(data, **SMALL))
    assert run.train(before_batch(3, change), config, out) == 0  # saved behind steps 4 and 6
    told = log(out)
    (line,) = [line for line in told.splitlines() if "files of the data have changed since this run began" in line]
    assert line.partition("began: ")[2].startswith("data: a.jsonl; if their content has, ")
    assert told.index(line) > told.index("first step after")
    with pytest.raises(UsageError, match=r"\n  changed: data: a.jsonl$"):
        train(data, out, regime__num_steps=8)


def test_changed_data_is_refused_by_the_names_of_its_files_and_taken_if_asked_to(texts: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(texts, data)
    assert train(data, out) == 0
    before = remains(out)
    with kept(data):
        (data / "a.jsonl").write_bytes((data / "a.jsonl").read_bytes().replace(b"fold", b"gold", 1))
        with pytest.raises(UsageError, match=r"--resume-with-changes, .*\n  changed: data: a.jsonl$"):
            train(data, out)
    with kept(data):
        (data / "b.jsonl").unlink()
        with pytest.raises(UsageError, match=r"\n  missing: data: b.jsonl$"):
            train(data, out)
    (data / "c.jsonl").write_text('{"text": "one more"}\n')
    command = ["train", "lm", "--out", str(out), "--config", *pairs(data, **SMALL)]
    ended = end(start(*command))
    assert ended.status == 2
    assert ended.errors.splitlines() == [
        f"error: {out}: holds a run on other data; go on with the data as it is now by --resume-with-changes, "
        "or choose another output directory",
        "  added: data: c.jsonl",
    ]
    assert remains(out) == before
    assert train(data, out, with_changes=True, regime__num_steps=8) == 0
    assert [row["step"] for row in metrics(out)] == list(range(1, 9))
    newest = json.loads((out / "checkpoints/step_00000008/state.json").read_text())
    assert newest["files"].keys() == {"recipe", "tokenizer", "data: a.jsonl", "data: b.jsonl", "data: c.jsonl"}
    assert train(data, out, regime__num_steps=9) == 0, "the new data is now the run's own"


def test_a_touched_file_is_not_a_changed_one(texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "out") == 0
    os.utime(tmp_path / "data/a.jsonl", (2**31, 2**31))
    assert train(tmp_path / "data", tmp_path / "out") == 0


@pytest.mark.parametrize(
    "changes",
    [{"dataset__num_workers": 2}, {"dataset__num_workers": 1, "dataset__prefetch": 3}, {"dataset__cache": "{tmp}/tokens"}],
)
def test_workers_and_a_cache_from_the_middle_of_a_run_on_change_nothing(
    whole: Path, texts: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints/step_00000006")
    changes = {key: str(value).format(tmp=tmp_path) for key, value in changes.items()}
    assert train(texts, out, **changes) == 0
    assert "going on after step 4" in log(out)
    assert results(out) == results(whole)
    assert bool(list(tmp_path.glob("tokens/*/*.safetensors"))) == ("dataset__cache" in changes)


def test_a_run_with_workers_leaves_what_a_run_without_leaves(whole: Path, texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, dataset__num_workers=2, dataset__prefetch=2) == 0
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_data_that_ends_in_workers_ends_the_run(texts: Path, tmp_path: Path, workers: int) -> None:
    """A slow consumer: the workers have long ended when it takes their last batches."""
    slow = {**EPOCH, "regime__validate_every_n_steps": 1, "dataset__batch_size": 32, "dataset__prefetch": 2}
    assert train(texts, tmp_path / "none", **slow) == 0
    assert train(texts, tmp_path / "some", **slow, dataset__num_workers=workers) == 0
    assert results(tmp_path / "some") == results(tmp_path / "none")


# Bad records.


@pytest.fixture
def bad(texts: Path, tmp_path: Path) -> Path:
    """A file whose line 440 of 481 is no JSON."""
    lines = 4 * (texts / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join([*lines[:439], "not JSON\n", *lines[439:]]))
    return tmp_path / "bad.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_ends_the_run_with_its_place(bad: Path, tmp_path: Path, workers: int) -> None:
    changes = {
        **EPOCH,
        "dataset__order": "sequential",
        "dataset__batch_size": 32,
        "dataset__prefetch": 2,
        "dataset__num_workers": workers,
    }
    with pytest.raises(DataError) as caught:
        train(bad, tmp_path / "out", **changes)
    assert str(caught.value).startswith(f"{bad}:440 (byte ")
    assert str(caught.value).endswith("\n  not JSON")
    assert metrics(tmp_path / "out"), "there were good records before it"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_within_the_limit_is_told_and_skipped(bad: Path, texts: Path, tmp_path: Path, workers: int) -> None:
    changes = {
        **EPOCH,
        "dataset__max_bad_records": 1,
        "dataset__batch_size": 32,
        "dataset__num_workers": workers,
    }
    assert train(bad, tmp_path / "out", **changes) == 0
    warnings = [line.partition("  ")[2] for line in log(tmp_path / "out").splitlines() if "bad record" in line]
    assert warnings
    assert warnings[0].startswith(f"bad record skipped (1 of at most 1): {bad}:440 (byte ")
    good = [json.loads(line)["text"] for line in 4 * (texts / "a.jsonl").read_text().splitlines()]
    trained = [text for text in good if not held_out(Document(text), 0.2)]
    assert sum(row["train/targets"] for row in metrics(tmp_path / "out")) == sum(len(text) + 1 for text in trained)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_directory_holds_beside_its_data_is_told_once_a_run(texts: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(texts, tmp_path / "data")
    (tmp_path / "data/README.md").touch()
    assert train(tmp_path / "data", tmp_path / "out", dataset__num_workers=workers) == 0
    lines = log(tmp_path / "out").splitlines()
    assert [line.split("  ", 1)[1] for line in lines if "left out" in line] == [f"{tmp_path}/data: left out: 1 .md"]


# Several sources.


def test_each_of_two_sources_has_a_loss_and_their_targets_add_up(texts: Path, tmp_path: Path) -> None:
    sources = f"[{{path: {texts / 'a.jsonl'}, weight: 3}}, {{path: {texts / 'b.jsonl'}, name: other}}]"
    assert train(texts, tmp_path, dataset__sources=sources) == 0
    lines = [("train", row) for row in metrics(tmp_path)] + [("valid", row) for row in metrics(tmp_path, "valid")]
    assert len(lines) == 7
    for kind, row in lines:
        parts = [(row[f"{kind}/loss/{name}"], row[f"{kind}/targets/{name}"]) for name in ("a", "other")]
        assert sum(count for _, count in parts) == row[f"{kind}/targets"]
        whole = sum(loss * count for loss, count in parts if count) / row[f"{kind}/targets"]
        assert whole == pytest.approx(row[f"{kind}/loss"], rel=1e-5)
        assert all((loss is None) == (count == 0) for loss, count in parts)
    first, second = (sum(row[f"train/targets/{name}"] for row in metrics(tmp_path)) for name in ("a", "other"))
    assert first > second > 0


def test_a_source_of_validation_alone_has_a_loss_there_and_null_in_training(texts: Path, tmp_path: Path) -> None:
    changes = {
        "dataset__sources": f"[{{path: {texts / 'a.jsonl'}}}]",
        "dataset__valid_sources": f"[{{path: {texts / 'b.jsonl'}}}]",
        "dataset__valid_fraction": 0,
    }
    assert train(texts, tmp_path, **changes) == 0
    found = {
        (row["train/targets/b"], row["train/loss/b"], row["train/loss/a"] == row["train/loss"]) for row in metrics(tmp_path)
    }
    assert found == {(0, None, True)}
    (row,) = metrics(tmp_path, "valid")
    assert (row["valid/targets/a"], row["valid/loss/a"], row["valid/loss/b"]) == (0, None, row["valid/loss"])
    assert math.isfinite(row["valid/loss"])


# The tokens that begin and end documents.


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_begin_and_end_of_documents_are_in_the_rows_if_asked_for(texts: Path, add_bos: bool, add_eos: bool) -> None:
    long = {"model__config": "{max_seq_len: 256}", "dataset__max_seq_len": 256}
    marks = {"tokenizer__add_bos": str(add_bos).lower(), "tokenizer__add_eos": str(add_eos).lower()}
    config, _ = resolve(recipe.config, (), pairs(texts, **long, **marks))
    pieces = 0
    for batch, _ in islice(train_stream(config, LaneAssignment())(None), 3):
        starts, ends = batch.mask & (batch.positions == 0), batch.mask.copy()
        ends[:, :-1] &= batch.segments[:, :-1] != batch.segments[:, 1:]
        assert set((batch.tokens[starts] == 256).tolist()) == {add_bos}
        assert set((batch.targets[ends] == 256).tolist()) == {add_eos}
        pieces += int(starts.sum())
    assert pieces > 24


# Workers of a real run.


def children(pid: int) -> list[int]:
    """The workers of a process: its children but for multiprocessing's own helper."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_killed_worker_ends_the_run_with_one_clear_line(texts: Path, tmp_path: Path) -> None:
    process = start("train", "lm", "--out", str(tmp_path), "--config", *pairs(texts, **FOREVER))
    wait_for_step(process, tmp_path, 5)
    first, second = children(process.pid)
    os.kill(first, signal.SIGKILL)
    ended = end(process)
    assert ended.status == 1
    (line,) = ended.errors.splitlines()
    assert line.startswith("error: a worker of the data (data ")
    assert " ended by SIGKILL before its stream did" in line
    assert not Path(f"/proc/{second}").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), EXIT_STATUS.items())
def test_a_signal_to_the_workers_too_is_meant_for_the_run(texts: Path, tmp_path: Path, number: int, status: int) -> None:
    command = ["train", "lm", "--out", str(tmp_path), "--config", *pairs(texts, **FOREVER)]
    process = start(*command)
    wait_for_step(process, tmp_path, 5)
    workers = children(process.pid)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, number)
    time.sleep(0.2)
    process.send_signal(number)
    ended = end(process)
    assert (ended.status, ended.errors) == (status, "")
    assert "saved step" in ended.output.splitlines()[-1]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def wait_for_step(process: Any, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while last_step(out) < step:
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_behind(texts: Path, tmp_path: Path) -> None:
    process = start("train", "lm", "--out", str(tmp_path), "--config", *pairs(texts, **FOREVER))
    wait_for_step(process, tmp_path, 1)
    workers = children(process.pid)
    process.kill()
    ended: Ended = end(process)
    assert ended.status == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
