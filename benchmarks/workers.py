"""Systems under test in processes of their own, which work in turns.

A worker module has `setup(system, case) -> work`, where `work() -> amount` does one round's work. Each system gets a fresh
process; the processes then take turns, round by round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import attrs


@attrs.frozen
class Round:
    """One round of one system: the amount of work, CPU and wall seconds, and the process's peak memory so far in MiB."""

    amount: float
    cpu: float
    wall: float
    peak: float


def take_turns(module: str, systems: Sequence[str], case: str, rounds: int, warmup: int = 1) -> dict[str, list[Round]]:
    """`rounds` rounds of every system after `warmup` uncounted ones."""
    measured: dict[str, list[Round]] = {system: [] for system in systems}
    with ExitStack() as stack:
        workers = {system: stack.enter_context(_worker(module, system, case)) for system in systems}
        for number in range(warmup + rounds):
            for system, (ask, answer) in workers.items():
                ask.write("go\n")
                ask.flush()
                done = Round(**json.loads(answer.readline()))
                if number >= warmup:
                    measured[system].append(done)
    return measured


@contextmanager
def _worker(module: str, system: str, case: str) -> Iterator[tuple[IO[str], IO[str]]]:
    command = [sys.executable, "-m", "benchmarks.workers", module, system, case]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdin, process.stdout
    finally:
        process.stdin.close()
        process.wait()


def status(name: str) -> float:
    """A figure of this process in MiB, as Linux tells it; `ru_maxrss` would begin with the peak of whoever started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _work(module: str, system: str, case: str) -> None:
    work = importlib.import_module(f"benchmarks.{module}").setup(system, case)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        amount = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps(attrs.asdict(Round(amount, cpu, wall, status("VmHWM")))), flush=True)


if __name__ == "__main__":
    _work(*sys.argv[1:])
