"""Signals noted between steps, and sent to a real run from outside."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe import checkpoint
from fnrecipe.config import resolve
from fnrecipe.data import pipe
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import EXIT_AGAIN
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.recipes.lm.data import valid_stream
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.signals import EXIT_STATUS, Signals
from fnrecipe.shell import run_dir
from fnrecipe.shell import train as run
from tests.helpers import end, pairs, remains, rows, signal_at, start

TWICE = """
import os, signal
import attrs
from itertools import count
from fnrecipe.recipe import Evaluation
from fnrecipe.recipes.lm.train import recipe as lm

def loss(config):
    apply, calls = lm.loss(config), count(1)

    def twice(*args):
        if next(calls) == 11:  # in step 6, of two leaves
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return apply(*args)

    return twice

recipe = attrs.evolve(lm, loss=loss)
"""

SMALL = {"regime__num_steps": 6, "dataset__prefetch": 0, "trainer__jit": "off"}


def train(texts: Path, out: Path, trained: Recipe[Any] = recipe, **changes: Any) -> int:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))
    return run.train(trained, config, out)


def lines(out: Path) -> list[str]:
    """Of the log, without their times."""
    log = (out / run_dir.log(0)).read_text(encoding="utf-8")
    return [line.partition("  ")[2] for line in log.splitlines()]


def signalled(number: int) -> None:
    """Sends the signal to this process, and then waits for ever."""
    os.kill(os.getpid(), number)
    while True:
        time.sleep(1)


def endless(wait: Callable[[], Any], after: int) -> Callable[..., Stream[Any]]:
    """A stage that gives so many items, and then only waits."""

    def stage(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
        yield from islice(source(cursor), after)
        wait()

    return stage


@pytest.mark.parametrize("number", EXIT_STATUS)
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
    for number, status in EXIT_STATUS.items():
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
def test_the_second_signal_ends_a_run_at_once_and_says_from_where_it_goes_on(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    out = tmp_path / "out"
    process = start("train", str(tmp_path / "twice.py"), "--out", str(out), "--config", *pairs(texts, trainer__jit="off"))
    ended = end(process)
    assert ended.status == -signal.SIGINT
    newest = out / "checkpoints/step_00000004"
    assert ended.errors == f"\nended at once: the newest checkpoint is {newest}, and the same command goes on from there\n"
    assert "saved" not in ended.output
    assert checkpoint.committed(out / "checkpoints") == [newest]


STUCK = """
import attrs, torch
from fnrecipe.data import pipe
from fnrecipe.recipe import Evaluation
from fnrecipe.recipes.lm.train import recipe as lm

def busy(source, cursor=None):
    stream = source(cursor)
    for _ in range(8):
        yield next(stream)
    product = torch.ones(99, 99)
    while True:
        product @ product

recipe = attrs.evolve(lm, stream=lambda config, place: pipe(lm.stream(config, place), busy))
"""


@pytest.mark.slow
def test_a_thread_that_is_stuck_in_its_work_does_not_change_the_status(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    changes = {**SMALL, "dataset__prefetch": 1, "regime__num_steps": 30}
    process = start("train", str(tmp_path / "stuck.py"), "--out", str(tmp_path), "--config", *pairs(texts, **changes))
    ended = signal_at(process, tmp_path, 6, signal.SIGTERM)
    assert (ended.status, ended.errors) == (EXIT_AGAIN, "")
    assert "SIGTERM: saved step " in ended.output


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", EXIT_STATUS)
def test_a_signal_ends_the_wait_for_data_and_what_was_done_is_saved(
    texts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    waiting = endless(lambda: signalled(number), after=2)
    stuck = attrs.evolve(recipe, stream=lambda config, place: pipe(recipe.stream(config, place), waiting))
    assert train(texts, tmp_path, stuck) == EXIT_STATUS[number]
    assert lines(tmp_path)[-1] == f"{number.name}: saved step 2; the same command goes on from there"
    assert [place.name for place in checkpoint.committed(tmp_path / "checkpoints")] == ["step_00000002"]


def test_a_signal_ends_the_wait_for_a_thread_that_is_stuck(texts: Path, tmp_path: Path) -> None:
    free = threading.Event()

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        free.wait()

    stuck = attrs.evolve(recipe, stream=lambda config, place: pipe(recipe.stream(config, place), endless(wait, after=3)))
    try:
        assert train(texts, tmp_path, stuck, dataset__prefetch=1) == EXIT_AGAIN
    finally:
        free.set()
    last = checkpoint.committed(tmp_path / "checkpoints")[-1]
    assert lines(tmp_path)[-1].startswith(f"SIGTERM: saved step {int(last.name.removeprefix('step_'))};")


@pytest.mark.parametrize("part", ["corpora", "init", "stream", "first row"])
def test_a_signal_before_the_first_step_ends_a_run_that_has_nothing_to_save(texts: Path, tmp_path: Path, part: str) -> None:
    def stop(*args: Any) -> Any:
        signalled(signal.SIGTERM)

    waiting = endless(stop, after=0)
    changes = (
        {"stream": lambda config, place: pipe(recipe.stream(config, place), waiting)} if part == "first row" else {part: stop}
    )
    assert train(texts, tmp_path, attrs.evolve(recipe, **changes)) == EXIT_AGAIN
    assert not checkpoint.committed(tmp_path / "checkpoints")
    if part != "corpora":  # nothing is shown yet
        assert lines(tmp_path)[-1] == "SIGTERM: ended before a step was made; nothing is lost"
    assert train(texts, tmp_path) == 0


def test_a_signal_ends_a_validation_and_a_sample_which_the_same_command_makes_up_for(texts: Path, tmp_path: Path) -> None:
    def stop(*args: Any) -> Any:
        signalled(signal.SIGHUP)

    waiting = endless(lambda: signalled(signal.SIGINT), after=1)
    unseen = attrs.evolve(
        recipe, evaluations=lambda _: {"valid": Evaluation(lambda config, place: pipe(valid_stream(config, place), waiting))}
    )
    assert train(texts, tmp_path, unseen, regime__validate_every_n_steps=3) == 130
    assert lines(tmp_path)[-1] == "SIGINT: saved step 3; the same command goes on from there"
    assert train(texts, tmp_path, attrs.evolve(recipe, sample=stop), regime__validate_every_n_steps=3) == 129
    assert lines(tmp_path)[-1] == "SIGHUP: saved step 6; the same command goes on from there"
    assert train(texts, tmp_path, regime__validate_every_n_steps=3) == 0
    assert [row["step"] for row in rows(tmp_path / "metrics/valid.jsonl")] == [3, 6]
    assert (tmp_path / "sample.txt").exists()


def test_a_run_in_a_thread_hears_no_signals_and_is_any_other(texts: Path, tmp_path: Path) -> None:
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(train(texts, tmp_path / "a")))
    thread.start()
    thread.join()
    assert ended == [0]
    assert train(texts, tmp_path / "b") == 0
    assert remains(tmp_path / "a") == remains(tmp_path / "b")
