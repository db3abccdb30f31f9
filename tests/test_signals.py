"""Signals noted between steps, and sent to a real run from outside."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fnrecipe import checkpoint
from fnrecipe.signals import Signals
from tests.helpers import end, pairs, remains, signal_at, start

TWICE = """
import os, signal
import attrs
from fnrecipe.data import pipe
from fnrecipe.recipes.lm.train import recipe as lm

def twice(source, cursor=None):
    for number, entry in enumerate(source(cursor), 1):
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        yield entry

recipe = attrs.evolve(lm, stream=lambda config, place: pipe(lm.stream(config, place), twice))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_a_run_stopped_by_each_signal_in_turn_leaves_what_an_uninterrupted_run_leaves(
    uninterrupted: Path, texts: Path, tmp_path: Path
) -> None:
    command = ("train", "lm", "--out", str(tmp_path), "--config", *pairs(texts))
    saved = 0
    for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)]:
        ended = signal_at(start(*command), tmp_path, saved + 2, number)
        assert (ended.status, ended.errors) == (status, "")
        step = int(checkpoint.committed(tmp_path / "checkpoints")[-1].name.removeprefix("step_"))
        assert saved + 2 <= step < 30
        last = f"{number.name}: saved step {step}; the same command goes on from there"
        assert [line for line in ended.output.splitlines() if number.name in line] == [last] == ended.output.splitlines()[-1:]
        saved = step
    assert end(start(*command)).status == 0
    found, expected = remains(tmp_path), remains(uninterrupted)
    last = "checkpoints/step_00000030/state_0000.safetensors"
    assert found[last] == expected[last]
    assert {name: data for name, data in found.items() if name in expected} == expected


@pytest.mark.slow
def test_the_second_signal_ends_a_run_at_once(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    out = tmp_path / "out"
    process = start("train", str(tmp_path / "twice.py"), "--out", str(out), "--config", *pairs(texts, dataset__prefetch=0))
    ended = end(process)
    assert ended.status == -signal.SIGINT
    assert ended.errors == ""
    assert "saved" not in ended.output
    assert [place.name for place in checkpoint.committed(out / "checkpoints")] == ["step_00000004"]
