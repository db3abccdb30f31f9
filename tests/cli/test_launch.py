"""The launcher behind `--nproc`: real processes, whose ranks do what a test says instead of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, python
from tests.helpers import Ended, end, pairs, signal_at, start

PROGRAM = """
import os, re, signal, time
import click
from fnrecipe.cli.launch import launch
from fnrecipe.cli.main import _exit
from fnrecipe.errors import DataError, LostError, UsageError
from fnrecipe.runtime.launcher import launched, meeting
from fnrecipe.runtime.signals import EXIT_STATUS, Signals

def say(text):
    os.write(1, f"{{text}}\\n".encode())

def train(rank):
    {body}

@click.command()
def command():
    return launch(2) if meeting() is None else train(launched().rank)

_exit(command)
"""

STOPS = """
    with Signals(once=True) as signals:
        say("ready")
        while signals.received is None:
            time.sleep(0.01)
        time.sleep(0.5)
        say(signals.received.name)
    return EXIT_STATUS[signals.received]
"""
HANGS = """
    say("ready")
    re.match("(a+)+$", "a" * 60 + "b")
"""


def launcher(tmp_path: Path, body: str, *before: str) -> subprocess.Popen[str]:
    """The launcher of two ranks that run `body`; it leads a group of processes, and its temporary files are in `tmp_path`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(body=body.strip()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [*before, sys.executable, str(program)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("return 0", 0, ""),
        ("return 75", 75, ""),
        ("raise UsageError('a: expected b, found c\\n  more')", 2, "error: a: expected b, found c\n  more\n"),
        ("raise (LostError, DataError)[rank](f'line {rank}')", 1, "rank 1: error: line 1\n"),
        ("raise (DataError, LostError)[rank](f'line {rank}')", 1, "rank 0: error: line 0\n"),
        ("raise LostError(f'rank {1 - rank} does not answer')", 1, "rank 0: error: rank 1 does not answer\n"),
    ],
)
def test_ranks_end_with_the_status_and_the_one_error_of_one_process(
    tmp_path: Path, body: str, status: int, errors: str
) -> None:
    assert end(launcher(tmp_path, body)) == Ended(status, "", errors)
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_a_defect_shows_one_traceback(tmp_path: Path) -> None:
    ended = end(launcher(tmp_path, "raise KeyError('k')"))
    assert ended.status == 1
    assert ended.errors.count("Traceback") == 1
    assert ended.errors.endswith("KeyError: 'k'\n")


LOST = "raise LostError('rank 1 does not answer')"


@pytest.mark.parametrize(
    ("dies", "others", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(3600)", "was ended by SIGKILL"),
        ("os.abort()", LOST, "was ended by SIGABRT"),
        ("signal.raise_signal(40)", LOST, "was ended by signal 40"),
        ("os._exit(5)", "time.sleep(3600)", "ended with status 5"),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path: Path, dies: str, others: str, how: str) -> None:
    ended = end(launcher(tmp_path, f"if rank: {dies}\n    {others}"))
    assert ended == Ended(1, "", f"error: rank 1 {how}; the same command goes on from the last checkpoint\n")


@pytest.mark.parametrize(
    ("number", "status", "to_all"),
    [("SIGINT", 130, True), ("SIGTERM", 75, True), ("SIGHUP", 129, True), ("SIGUSR1", 75, True), ("SIGUSR1", 75, False)],
)
def test_a_signal_comes_to_every_rank_as_one(tmp_path: Path, number: str, status: int, to_all: bool) -> None:
    """Sent to the whole group of processes, as by a terminal, it comes to the ranks and is sent on to them."""
    process = launcher(tmp_path, STOPS)
    until_ready(process)
    (os.killpg if to_all else os.kill)(process.pid, signal.Signals[number])
    assert end(process) == Ended(status, f"{number}\n" * 2, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_ranks_can_save_ends_them_as_it_ends_one_process(tmp_path: Path, number: signal.Signals) -> None:
    process = launcher(tmp_path, HANGS)
    until_ready(process)
    process.send_signal(number)
    assert end(process) == Ended(-number, "", "")


def test_ctrl_c_before_ranks_can_save_ends_with_status_130(tmp_path: Path) -> None:
    process = launcher(tmp_path, HANGS)
    until_ready(process)
    os.killpg(process.pid, signal.SIGINT)
    assert end(process) == Ended(130, "", "\n")


def test_the_second_signal_ends_ranks_that_do_not_stop(tmp_path: Path) -> None:
    process = launcher(tmp_path, STOPS.replace("time.sleep(0.5)", "say('noted'); time.sleep(3600)"))
    until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    assert end(process).status == -signal.SIGTERM


def test_under_nohup_a_hangup_is_ignored(tmp_path: Path) -> None:
    process = launcher(tmp_path, STOPS, "nohup")
    until_ready(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert (ended.status, ended.output) == (75, "SIGTERM\n" * 2)


def test_ranks_end_with_their_launcher_even_if_they_hang(tmp_path: Path) -> None:
    process = launcher(tmp_path, HANGS)
    until_ready(process)
    process.kill()
    process.communicate(timeout=60)  # to the end of the output: of all processes that can write to it


READY = "os.write(1, b'ready\\\\n')"
PARENT = """
import subprocess, sys
code = "import os, time; from fnrecipe.runtime.launcher import follow, watch; parent = os.getppid(); {body}"
subprocess.run([sys.executable, "-c", code])
"""


@pytest.mark.parametrize(
    "body", [f"follow(); {READY}; time.sleep(3600)", f"{READY}; watch(parent)"], ids=["torchrun", "no Linux"]
)
def test_ranks_end_with_torchrun_and_where_no_kernel_ends_them_too(body: str) -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    command = [sys.executable, "-c", PARENT.format(body=body)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.parametrize("size", [1, 2])
def test_a_launcher_in_a_launcher_is_refused(tmp_path: Path, size: int) -> None:
    outer = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    command = ["-m", "fnrecipe.cli", "train", f"--nproc={size}", "lm", "--out", "x"]
    ended = python(*command, cwd=tmp_path, **outer)
    assert ended.status == 2
    assert ended.err.startswith("rank 1: error: --nproc: expected to be the only launcher, found rank 1 of 4")


def train(texts: Path, out: Path, **changes: object) -> subprocess.Popen[str]:
    """A run of two ranks with a data worker each, in a group of processes of its own."""
    config = pairs(texts, dataset__num_lanes=8, gang__num_microbatches=8, dataset__num_workers=1, trainer__jit="off", **changes)
    command = ["train", "--config", *config, f"--out={out}", "--nproc=2", "lm"]
    return start(*command, env={"TMPDIR": str(out.parent)}, start_new_session=True)


@pytest.mark.slow
def test_a_run_ends_with_its_launcher_and_goes_on_until_a_hangup_but_not_under_another_config(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert signal_at(train(texts, out), out, 6, signal.SIGKILL).status == -signal.SIGKILL
    process = train(texts, out)
    process.send_signal = lambda number: os.killpg(process.pid, number)  # type: ignore[method-assign]
    ended = signal_at(process, out, 13, signal.SIGHUP)
    assert (ended.status, ended.errors) == (129, "")
    assert "going on after step" in ended.output
    assert ended.output.count("SIGHUP: saved step") == 1
    refused = end(train(texts, out, optimizer__config__lr=0.5))
    assert (refused.status, refused.output) == (2, "")
    assert [line.split(": ")[-1][:21] for line in refused.errors.splitlines()] == [
        "holds a run with anot",
        "0.0015 there, 0.5 now",
    ]


@pytest.mark.slow
def test_a_rank_that_is_killed_while_the_others_wait_for_it_ends_them(texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os, signal\nfrom fnrecipe.recipes.lm.train import recipe\n"
        "if os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = end(start("train", str(recipe), "--nproc", "2", "--out", str(tmp_path / "out"), fresh=True))
    assert ended == Ended(1, "", "error: rank 1 was ended by SIGKILL; the same command goes on from the last checkpoint\n")
