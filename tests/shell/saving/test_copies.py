"""Runs that copy their checkpoints to a remote file system, and go on from there."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe.checkpoint import remote
from fnrecipe.config import resolve
from fnrecipe.errors import ConfigError, FnrecipeError, UsageError
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime import remote as files
from fnrecipe.runtime.remote import RemoteDirectory, remote_directory
from fnrecipe.shell.saving import copier
from fnrecipe.shell.saving.remote_copies import copy_from
from fnrecipe.shell.train import train as run
from tests.helpers import pairs, remains
from tests.shell.saving.test_save import observing

SMALL = {
    "trainer__jit": "off",
    "dataset__prefetch": 0,
    "regime__num_steps": 9,
    "regime__checkpoint_every_n_steps": 3,
    "regime__keep_last_n_checkpoints": 2,
    "regime__num_sample_tokens": 4,
}


def train(texts: Path, out: Path, trained: Recipe[Any] = recipe, **changes: Any) -> int:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))
    return run(attrs.evolve(trained, origin="lm"), config, out)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/run"


def steps(address: str) -> list[int]:
    return list(remote.complete(remote_directory(address)).values())


def test_a_run_that_lost_its_disk_goes_on_from_its_copy_to_the_same_bits(texts: Path, tmp_path: Path) -> None:
    address = f"memory://me:hunter2@{tmp_path.name}/run"
    assert train(texts, tmp_path / "one", regime__copy_checkpoints_to=address) == 0
    assert steps(address) == [6, 9]
    assert not [path for path in (tmp_path / "one").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    copied = copy_from(address, tmp_path / "two")
    assert [path.name for path in copied] == ["step_00000009"]
    assert [path.name for path in copy_from(address, tmp_path / "two", [6])] == ["step_00000006"]
    for out in ("one", "two"):
        assert train(texts, tmp_path / out, regime__num_steps=12) == 0
    assert remains(tmp_path / "one") == remains(tmp_path / "two")


def test_a_new_run_does_not_write_over_what_is_further_or_another(texts: Path, tmp_path: Path, address: str) -> None:
    assert train(texts, tmp_path / "one", regime__num_steps=4, regime__copy_checkpoints_to=address) == 0
    with pytest.raises(
        UsageError, match=r"has step 4, and the run in .* goes on after 0; bring it back by `fnrecipe checkpoint"
    ):
        train(texts, tmp_path / "two", regime__copy_checkpoints_to=address)
    assert train(texts, tmp_path / "three", regime__num_steps=4, common__seed=7) == 0
    with pytest.raises(
        UsageError, match=r"^regime.copy_checkpoints_to: memory:.*the same run, found one with another common.seed"
    ):
        train(texts, tmp_path / "three", regime__num_steps=4, common__seed=7, regime__copy_checkpoints_to=address)
    assert steps(address) == [3, 4]


def test_what_was_not_copied_is_copied_by_the_same_command(
    texts: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: Any) -> str:
        raise FnrecipeError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "upload", lost)
        with pytest.raises(FnrecipeError, match=r"^the network is gone$"):
            train(texts, tmp_path / "one", regime__copy_checkpoints_to=address)
    told = [line for line in capsys.readouterr().out.splitlines() if "the network is gone" in line]
    assert [line.split(": ")[1] for line in told] == [f"step {step}" for step in (3, 6, 9)]
    assert steps(address) == []
    assert train(texts, tmp_path / "one", regime__copy_checkpoints_to=address) == 0
    assert steps(address) == [9]


def test_steps_wait_for_no_copy_and_the_end_does(
    texts: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, real, begun = threading.Event(), remote.upload, list[str]()

    def slow(source: Path, there: RemoteDirectory) -> str:
        begun.append(source.name)
        assert made.wait(60), "the steps behind the copy are not made"
        return real(source, there)

    monkeypatch.setattr(remote, "upload", slow)
    last = observing(lambda number: made.set() if number == 8 else None)
    assert train(texts, tmp_path / "one", last, regime__copy_checkpoints_to=address) == 0
    assert begun[0] == "step_00000003"
    assert begun[-1] == "step_00000009"
    assert "step_00000006" not in begun
    assert "step 6 is not copied: the copy before it is under way" in capsys.readouterr().out
    assert steps(address)[-1] == 9


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(
    texts: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    first = observing(lambda number: pytest.fail("a step was made"))
    with pytest.raises(FnrecipeError, match=r"file/run/config\.yaml: cannot write: "):
        train(texts, tmp_path / "one", first, regime__copy_checkpoints_to=tmp_path / "file/run")
    with pytest.raises(UsageError, match="another place than the output directory"):
        train(texts, tmp_path / "one", first, regime__copy_checkpoints_to=tmp_path / "one")
    with pytest.raises(ConfigError, match="expected an address, a directory, or null"):
        train(texts, tmp_path / "one", first, regime__copy_checkpoints_to="''")


def test_a_run_that_goes_back_takes_its_copies_back(
    texts: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    real = copier.forget_copies_after
    from fnrecipe.shell.guards import spikes

    def forget(session: Any, step: int) -> None:
        real(session, step)
        found.extend(steps(address))

    monkeypatch.setattr(spikes, "forget_copies_after", forget)
    rollback = {
        "regime__on_spike": "rollback",
        "regime__spikes": "{window: 4, bound: 0.0001, pass_over: 2, max_rollbacks: 1}",
        "regime__checkpoint_every_n_steps": 1,
        "regime__keep_last_n_checkpoints": "null",
    }
    with pytest.raises(FnrecipeError):
        train(texts, tmp_path / "one", regime__copy_checkpoints_to=address, **rollback)
    assert found
    assert all(step <= 4 for step in found)
