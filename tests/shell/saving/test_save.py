"""Saves beside the steps of a run: what waits for what, and how an error ends the run."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe import checkpoint
from fnrecipe.config import resolve
from fnrecipe.errors import CheckpointError, DataError
from fnrecipe.observe import Ticks
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime import capacity
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import layout
from tests.helpers import pairs, remains, rows
from tests.shell.stages import before_batch

SMALL = {"trainer__jit": "off", "dataset__prefetch": 0, "regime__num_steps": 9, "regime__checkpoint_every_n_steps": 3}


def train(texts: Path, out: Path, trained: Recipe[Any] = recipe, **changes: Any) -> int:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))
    return run.train(trained, config, out)


@pytest.fixture(scope="module")
def waited(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps wait for saves."""
    out = tmp_path_factory.mktemp("save") / "waited"
    assert train(texts, out, regime__checkpoint_in_background=False) == 0
    return out


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    key = b"checkpoint_in_background: "
    configs = [run.pop("config.yaml").replace(key + b"false", key + b"true") for run in (found, expected)]
    return configs[0] == configs[1] and found == expected


def observing(look: Callable[[int], None]) -> Recipe[Any]:
    """The recipe, with an observer that calls `look` after each step."""

    def observer(ticks: Ticks) -> Ticks:
        for tick in ticks:
            if tick.metrics is not None:
                look(tick.number)
            yield tick

    return attrs.evolve(recipe, observers=lambda config, write: [observer])


def with_writer(patch: pytest.MonkeyPatch, before: Callable[[int], None], after: Callable[[int], None] = lambda step: None):  # type: ignore[no-untyped-def]
    """Lets each save call `before` and `after` with its step, on the thread that writes it."""
    real = checkpoint.write

    def write(root: Path, step: int, *args: Any) -> Path:
        before(step)
        found = real(root, step, *args)
        after(step)
        return found

    patch.setattr(checkpoint, "write", write)


def test_a_step_does_not_wait_for_a_save_and_the_next_save_and_the_end_do(
    texts: Path, waited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {number: threading.Event() for number in range(1, 10)}
    found: list[str] = []

    def before(step: int) -> None:
        assert step == 9 or made[step + 2].wait(60), "the steps behind the save are not made"
        found.append(f"begin {step}")

    with_writer(monkeypatch, before, lambda step: found.append(f"end {step}"))
    assert train(texts, tmp_path, observing(lambda number: made[number].set())) == 0
    assert found == [f"{what} {step}" for step in (3, 6, 9) for what in ("begin", "end")]
    assert same(remains(tmp_path), remains(waited))


def test_what_is_being_saved_when_a_run_fails_is_there(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def stop() -> None:
        failed.set()
        raise DataError("stop")

    with_writer(monkeypatch, lambda step: assert_set(failed))
    with pytest.raises(DataError, match=r"^stop$"):
        train(texts, tmp_path, before_batch(4, stop))
    assert names(tmp_path) == ["step_00000003"]


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def names(out: Path) -> list[str]:
    return [place.name for place in checkpoint.committed(out / layout.CHECKPOINTS)]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("beside", [True, False])
def test_a_save_that_does_not_fit_on_the_disk_ends_the_run_and_the_same_command_goes_on(
    texts: Path, waited: Path, tmp_path: Path, beside: bool
) -> None:
    with pytest.raises(DataError):  # a checkpoint to lose
        train(texts, tmp_path, before_batch(5, stop))
    with (
        files_of_at_most(100_000),
        pytest.raises(
            CheckpointError,
            match=r"step_00000006: cannot write the checkpoint: File too large, behind [0-9,]{6,} of [0-9,]{7,} bytes",
        ),
    ):
        train(texts, tmp_path, regime__checkpoint_in_background=beside)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert rows(tmp_path / "metrics/train.jsonl")[-1]["step"] in (6, 7, 8)
    assert train(texts, tmp_path) == 0
    assert same(remains(tmp_path), remains(waited))


def stop() -> None:
    raise DataError("stop")


def test_the_error_of_a_save_ends_the_run_at_the_next_step(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        raise CheckpointError("full")

    def let_it_fail(number: int) -> None:
        made.append(number)
        for thread in threading.enumerate():
            if thread.name == "regime.checkpoint_in_background":
                thread.join()

    made: list[int] = []
    with_writer(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=r"^full$"):
        train(texts, tmp_path, observing(let_it_fail))
    assert made == [1, 2, 3]


def test_a_run_that_fails_twice_tells_both_errors(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(step: int) -> None:
        assert_set(failed)
        raise CheckpointError("full")

    def stop() -> None:
        failed.set()
        raise DataError("stop")

    with_writer(monkeypatch, fail)
    with pytest.raises(DataError, match=r"^stop$"):
        train(texts, tmp_path, before_batch(4, stop))
    assert "the save that was under way has failed, too: full" in (tmp_path / layout.log(0)).read_text()


def test_without_memory_for_a_copy_steps_wait_and_a_line_says_so(
    texts: Path, waited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()
    with_writer(monkeypatch, lambda step: threads.add(threading.current_thread()))
    monkeypatch.setattr(capacity, "free_memory", lambda: 300_000)
    assert train(texts, tmp_path) == 0
    assert threads == {threading.main_thread()}
    told = "regime.checkpoint_in_background: a copy of the state takes 0.0 GB of memory, of which 0.0 GB are free; steps wait"
    assert (tmp_path / layout.log(0)).read_text().count(told) == 1
    assert same(remains(tmp_path), remains(waited))
