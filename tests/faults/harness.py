"""Kills a run again and again, at moments seen from outside by its files, and looks at what is left each time.

A trial starts the run in its directory, in one or two processes, and ends it. The truth is a run that nothing disturbed: in the
end the directory holds the same bytes. All choices are drawn from a seed; only at which instruction a signal arrives is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

from fnrecipe.runtime.signals import EXIT_STATUS
from tests.helpers import pairs, remains, start

KEEP = 2
STEPS = 20
CHANGES = {
    "trainer__jit": "off",
    "regime__num_steps": STEPS,
    "regime__checkpoint_every_n_steps": 3,
    "regime__keep_last_n_checkpoints": KEEP,
    "regime__validate_every_n_steps": 5,
    "regime__publish_metrics_every_n_steps": 2,
    "gang__timeout": 0.5,
}
ONCE = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
WAYS: Mapping[str, Sequence[int]] = {
    **{number.name: [number] for number in ONCE},
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
    "SIGSTOP, SIGKILL": [signal.SIGSTOP, signal.SIGKILL],
}
"""Signals that end a run, one shortly after the other."""


def committed(out: Path) -> list[str]:
    return sorted(name for name in _names(out / "checkpoints") if name.startswith("step_") and name[5:].isdigit())


def saving(out: Path) -> bool:
    """A checkpoint is written beside its place."""
    return any(name.endswith(".tmp") and name[:-4] > max(committed(out), default="") for name in _names(out / "checkpoints"))


def saved(out: Path) -> bool:
    """A checkpoint is in its place, and the oldest one is not pruned yet."""
    return len(committed(out)) > KEEP


def pruning(out: Path) -> bool:
    """An old checkpoint has been taken out of its place, and is not gone yet."""
    return any(name.endswith(".tmp") and name[:-4] < max(committed(out), default="") for name in _names(out / "checkpoints"))


def validating(out: Path) -> bool:
    """A validation is due and not recorded."""
    last = max(_steps(out / "metrics/train.jsonl"), default=0)
    return last > 0 and last % 5 == 0 and last not in _steps(out / "metrics/valid.jsonl")


def starting(out: Path) -> bool:
    """The directory is claimed."""
    return (out / ".lock").exists()


def appending(out: Path, before: int) -> bool:
    """The metrics have grown since they had `before` bytes."""
    return _size(out / "metrics/train.jsonl") > before


MOMENTS: Mapping[str, Callable[[Path], bool]] = {
    "saving": saving,
    "saved, not pruned": saved,
    "pruning": pruning,
    "validating": validating,
    "starting": starting,
}


@attrs.frozen
class Trial:
    """How many processes, when they are ended and how; `steps` and `delay` (seconds) put the moment off.

    `beside`: whether they save beside their steps.
    """

    size: int
    moment: str
    way: str
    both: bool
    steps: int
    delay: float
    beside: bool


def draw(seed: int, number: int) -> Trial:
    chosen = random.Random(f"{seed} {number}")
    size, moment = chosen.choice([1, 1, 1, 2]), chosen.choice([*MOMENTS, "appending", "any", "any"])
    return Trial(
        size=size,
        moment=moment,
        way=chosen.choice(["SIGKILL", *WAYS]),
        both=moment == "starting" or chosen.random() < 0.7,  # one that starts waits long for another that is gone
        steps=chosen.randint(0, 3),
        delay=chosen.choice([0.0, 0.0, chosen.uniform(0, 0.02), chosen.uniform(0, 0.5)]),
        beside=chosen.random() < 0.75,
    )


@attrs.frozen
class Run:
    """A run that is disturbed, in `out`; `texts` is its data."""

    texts: Path
    out: Path

    def start(self, size: int, beside: bool = False) -> list[subprocess.Popen[str]]:
        changes = {**CHANGES, "regime__checkpoint_in_background": beside}
        args = ["train", "lm", "--out", str(self.out), "--config", *pairs(self.texts, **changes)]
        port = _free_port() if size > 1 else ""
        ranks = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            if size > 1
            else {}
            for rank in range(size)
        ]
        self.out.mkdir(exist_ok=True)
        with open(self.out / "output", "ab") as output:
            return [start(*args, env=rank, stdin=subprocess.DEVNULL, stdout=output, stderr=output) for rank in ranks]

    def finish(self) -> None:
        """Goes on to the end, in one process."""
        (process,) = self.start(1)
        status = process.wait()
        assert status == 0, (self.out / "output").read_text()

    def attempt(self, trial: Trial) -> list[int]:
        """Starts and ends it once; the statuses of its processes."""
        before = _size(self.out / "metrics/train.jsonl")
        first = max(_steps(self.out / "metrics/train.jsonl"), default=0)
        processes = self.start(trial.size, trial.beside)
        self._await(trial, processes, before, first)
        time.sleep(trial.delay)
        targets = processes if trial.both or trial.way.startswith("SIGSTOP") else processes[-1:]
        for number in WAYS[trial.way]:
            for process in targets:
                process.send_signal(number)
            time.sleep(0.002)
        return [process.wait() for process in processes]

    def _await(self, trial: Trial, processes: Sequence[subprocess.Popen[str]], before: int, first: int) -> None:
        """Until the moment has come, or a process has ended, or there is nothing left to wait for."""
        came = MOMENTS.get(trial.moment, lambda out: appending(out, before))
        started = time.monotonic()
        while all(process.poll() is None for process in processes) and time.monotonic() - started < 60:
            steps = max(_steps(self.out / "metrics/train.jsonl"), default=0)
            if trial.moment == "any":
                if _size(self.out / "output") and (trial.steps == 0 or steps >= min(first + trial.steps, STEPS - 1)):
                    return
            elif came(self.out):
                return


def disturb(run: Run, truth: Path, seed: int, kills: int) -> Iterator[list[int]]:
    """Ends the run up to so many times, looks at what is left each time, and lets it go on to its end.

    Gives the statuses of the processes after each trial.

    Raises:
        AssertionError: if something is left that should not be, or is lost.
    """
    seen, newest = set[str](), ""
    for number in range(kills):
        if committed(run.out)[-1:] == committed(truth)[-1:]:
            break
        trial = draw(seed, number)
        statuses = run.attempt(trial)
        assert is_expected(trial, statuses), (trial, statuses, (run.out / "output").read_text()[-2000:])
        newest = check(run.out, seen, newest)
        yield statuses
    end(run, truth)


def check(out: Path, seen: set[str], newest: str) -> str:
    """What has to hold after every kill; the newest checkpoint that is whole.

    seen    all checkpoints that were ever there, to which those that are there are added
    newest  the newest one that was whole before
    """
    there = committed(out)
    seen |= set(there)
    valid = [name for name in there if is_whole(out / "checkpoints" / name)]
    assert len(valid) >= min(KEEP, len(seen)), f"{len(valid)} whole checkpoints of {sorted(seen)}"
    assert max(valid, default="") >= newest, f"{newest} is lost"
    steps = _steps(out / "metrics/train.jsonl")
    assert steps == list(range(1, len(steps) + 1)), f"steps in the metrics: {steps}"
    assert max(valid, default="step_0")[5:].lstrip("0") in ("", *map(str, steps)), "what is saved is ahead of what is recorded"
    litter = [path for path in out.rglob("*") if path.name.endswith((".tmp", ".damaged"))]
    assert len(litter) <= 3, litter
    return max(valid, default="")


def is_whole(place: Path) -> bool:
    """Whether every file is what SHA256SUMS says, as `sha256sum -c` would tell."""
    lines = [line.split("  ") for line in (place / "SHA256SUMS").read_text().splitlines()]
    return {name for _, name in lines} == {*_names(place)} - {"SHA256SUMS"} and all(
        hashlib.sha256((place / name).read_bytes()).hexdigest() == digest for digest, name in lines
    )


def end(run: Run, truth: Path) -> None:
    """Lets the run go on to its end, which has to be that of `truth`."""
    run.finish()
    found, expected = remains(run.out), remains(truth)
    last = f"checkpoints/step_{STEPS:08d}/"
    kept = [name for name in expected if name.startswith(last) or not name.startswith("checkpoints/")]
    assert {name: found.get(name) for name in kept} == {name: expected[name] for name in kept}
    assert len(committed(run.out)) in (KEEP, KEEP + 1)  # one more if it was killed before the last pruning
    assert [row["step"] for row in _rows(run.out / "metrics/train.jsonl")] == list(range(1, STEPS + 1))


def is_expected(trial: Trial, statuses: Sequence[int]) -> bool:
    """Whether the processes ended as they should: done, stopped and saved, killed, or left behind by one that was."""
    numbers = WAYS[trial.way]
    ends = {0, *(-number for number in numbers), *(EXIT_STATUS.get(signal.Signals(number), 0) for number in numbers)}
    ends |= {130} if signal.SIGINT in numbers else set()  # before the run looks out for it
    return set(statuses) <= ends | ({1} if trial.size > 1 else set())


def _rows(path: Path) -> list[dict[str, int]]:
    """The whole lines of a record."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def _steps(path: Path) -> list[int]:
    return [row["step"] for row in _rows(path)]


def _names(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])
