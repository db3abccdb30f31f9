"""Signals noted between steps, and sent to a real run from outside."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest

from fnrecipe import checkpoint
from fnrecipe.config import resolve
from fnrecipe.data import pipe
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import EXIT_AGAIN, FnrecipeError, UsageError
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.recipes.lm.data import valid_stream
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.signals import EXIT_STATUS, Signals
from fnrecipe.shell import train as run
from fnrecipe.shell.directory import layout
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
    log = (out / layout.log(0)).read_text(encoding="utf-8")
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


def test_the_end_of_the_time_that_a_run_has_is_a_signal_to_save_and_the_same_command_goes_on(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def up() -> None:
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left < 60_000
        signalled(signal.SIGALRM)

    stuck = attrs.evolve(recipe, stream=lambda config, place: pipe(recipe.stream(config, place), endless(up, after=2)))
    assert train(texts, out, stuck, regime__max_minutes=1000) == EXIT_AGAIN
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert lines(out)[-1] == "regime.max_minutes: saved step 2; the same command goes on from there"
    assert train(texts, out) == train(texts, tmp_path / "undisturbed") == 0
    found, expected = remains(out), remains(tmp_path / "undisturbed")
    assert {name: found[name] for name in expected} == expected


def test_time_that_suffices_for_no_step_is_an_error_and_no_endless_loop(texts: Path, tmp_path: Path) -> None:
    stuck = attrs.evolve(
        recipe, stream=lambda config, place: pipe(recipe.stream(config, place), endless(lambda: time.sleep(1000), after=0))
    )
    told = r"^regime.max_minutes: expected time for a step at least, found none made in 0.001 minutes$"
    for going_on in (False, True):
        with pytest.raises(FnrecipeError, match=told):
            train(texts, tmp_path, stuck, regime__max_minutes=0.001)
        if not going_on:
            assert train(texts, tmp_path, regime__num_steps=4) == 0


def test_a_signal_behind_the_end_of_the_time_is_a_first_one_and_the_end_is_no_second_one() -> None:
    with Signals(seconds=1000) as signals:
        os.kill(os.getpid(), signal.SIGALRM)
        assert signals.received == signal.SIGALRM
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGALRM)
        assert signals.received == signal.SIGUSR1


def test_a_thread_that_hears_no_signals_has_no_end_of_its_time(texts: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(train, texts, tmp_path, regime__max_minutes=5).exception()
    assert isinstance(found, UsageError)
    assert str(found).startswith("regime.max_minutes: expected null for a run in another thread than the main one")


TIME_IS_UP = """
import os, signal
import attrs
from fnrecipe.data import pipe
from fnrecipe.recipes.lm.train import recipe as lm

def up(source, cursor=None):
    for number, entry in enumerate(source(cursor), 1):
        if number == 3 and os.environ.get("RANK") == "0":
            signal.raise_signal(signal.SIGALRM)
        yield entry

recipe = attrs.evolve(lm, stream=lambda config, place: pipe(lm.stream(config, place), up))
"""


@pytest.mark.slow
def test_all_ranks_end_behind_the_same_step_when_the_time_of_the_first_is_up(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "up.py").write_text(TIME_IS_UP)
    out = tmp_path / "out"
    small = pairs(texts, **SMALL, regime__max_minutes=1000)
    command = ("train", str(tmp_path / "up.py"), "--nproc", "2", "--out", str(out), "--config", *small)
    ended, saved = end(start(*command)), 0
    while ended.status == EXIT_AGAIN:
        (newest,) = [int(path.name.removeprefix("step_")) for path in checkpoint.committed(out / "checkpoints")[-1:]]
        assert f"regime.max_minutes: saved step {newest}; the same command goes on from there" in ended.output
        assert saved < newest < 6
        saved = newest
        ended = end(start(*command))
    assert (ended.status, ended.errors) == (0, "")
    assert saved > 0
    assert train(texts, tmp_path / "alone") == 0
    metrics = "metrics/train.jsonl"
    assert (out / metrics).read_bytes() == (tmp_path / "alone" / metrics).read_bytes()
