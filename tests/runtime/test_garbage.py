"""When Python's garbage collector runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fnrecipe.runtime import garbage
from tests.cli.helpers import fnrecipe_here


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_behind_a_pause_the_collector_is_as_it_was_before(before: bool, fails: bool) -> None:
    (gc.enable if before else gc.disable)()
    with suppress(ValueError), garbage.paused():
        assert not gc.isenabled()
        if fails:
            raise ValueError
    assert gc.isenabled() == before


def test_behind_frozen_objects_garbage_is_collected_again() -> None:
    with garbage.paused():
        garbage.freeze_objects()
        assert gc.get_freeze_count() > 0
        assert gc.isenabled()


def test_the_command_pauses_the_collector_until_the_run_ends_the_pause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    collecting = list[bool]()

    def train(*args: object, **others: object) -> int:
        collecting.append(gc.isenabled())
        return 0

    monkeypatch.setattr("fnrecipe.shell.train.train", train)
    assert fnrecipe_here(monkeypatch, capsys, "train", "lm", "--out", tmp_path / "run").status == 0
    assert collecting == [False]
    assert gc.isenabled()
