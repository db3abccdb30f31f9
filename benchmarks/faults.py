"""Runs that are killed, and what becomes of them, for as long as one likes.

A run in one or two processes is ended again and again, by several signals at moments that its files show, as in
`tests/faults`, whose harness this is: what is left is looked at each time, and in the end compared with an undisturbed run. A
run that does not come to that end is `lost`.

A process that does nothing but save a state beside its steps is killed at uniformly random moments, for half as long; each time
what is there is read: whole, the state of its step, and not before the step that the process knew to be saved.

torchrun's restarts: one run over two ranks with a cut state; as soon as it has made a step since its last start, one of the
ranks is killed, as often as there are rounds, and the run goes on from its newest checkpoint by itself. `recovered` counts how
often it came back; seconds are those from the kill to the next step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from benchmarks.report import Result
from tests.faults import saves
from tests.faults.harness import Run, disturb
from tests.helpers import write_texts

CONFIG = (
    "model.config={vocab_size: 264, max_seq_len: 64, model_dim: 64, num_layers: 2, num_attn_heads: 4, "
    "num_key_value_heads: 2, ffn_inner_dim: 128, tied_embeddings: true}",
    *("dataset.max_seq_len=64", "dataset.pack_window=32", "gang.device=cpu", "gang.sharding=fsdp", "gang.num_microbatches=2"),
    *("dataset.num_lanes=2", "regime.num_steps=1000000", "regime.checkpoint_every_n_steps=20"),
    *("regime.publish_metrics_every_n_steps=1", "regime.validate_every_n_steps=null", "common.torch.num_threads=1"),
)


def run(rounds: int, minutes: float = 1.0) -> list[Result]:
    return [*_harness(minutes), *_saves(minutes / 2), *_restarts(rounds)]


def _harness(minutes: float) -> list[Result]:
    deadline, kills, recovered, lost = time.monotonic() + 60 * minutes, 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts")
        truth = Run(folder / "texts", folder / "truth")
        truth.finish()
        for seed in count():
            if time.monotonic() > deadline:
                break
            run, before = Run(folder / "texts", folder / f"run {seed}"), kills
            try:
                for statuses in disturb(run, truth.out, seed, kills=12):
                    kills += any(statuses)
                recovered += kills - before
                shutil.rmtree(run.out)
            except AssertionError as error:
                print(f"seed {seed}: {error}", file=sys.stderr)
                lost += 1
    figures = {"kills": kills, "recovered": recovered, "runs lost": lost}
    return [Result("faults", "1 and 2 ranks", "harness", name, [float(value)], "times") for name, value in figures.items()]


def _saves(minutes: float) -> list[Result]:
    multiprocessing.set_forkserver_preload([saves.__name__])
    deadline, kills, lost = time.monotonic() + 60 * minutes, 0, 0
    for seed in count():
        with tempfile.TemporaryDirectory() as folder:
            try:
                for _ in saves.kills(Path(folder, "checkpoints"), seed, seconds=0.3):
                    kills += 1
                    if time.monotonic() > deadline:
                        break
            except AssertionError as error:
                print(f"seed {seed}: {error}", file=sys.stderr)
                kills, lost = kills + 1, lost + 1
        if time.monotonic() > deadline:
            break
    figures = {"kills": kills, "checkpoints lost": lost}
    return [Result("faults", "saves beside steps", "harness", name, [float(value)], "times") for name, value in figures.items()]


def _restarts(rounds: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        launcher = _start(Path(folder, "out"), rounds)
        try:
            seconds = _kill_again_and_again(launcher, Path(folder, "out"), rounds)
        finally:
            launcher.terminate()
            launcher.wait()
    recovered = Result("faults", "2 ranks, fsdp", "torchrun", f"recovered of {rounds} kills", [float(len(seconds))], "times")
    return [recovered, Result("faults", "2 ranks, fsdp", "torchrun", "from the kill to the next step", seconds, "s")]


def _start(out: Path, restarts: int) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", "fnrecipe.cli"]
    arguments = ["train", "lm", "--out", str(out), "--config", *CONFIG]
    return subprocess.Popen([*launcher, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill_again_and_again(launcher: subprocess.Popen[bytes], out: Path, rounds: int) -> list[float]:
    seconds: list[float] = []
    ranks = _wait_for_step(launcher, out, set())
    for number in range(rounds):
        os.kill(ranks[number % 2], signal.SIGKILL)
        killed = time.monotonic()
        try:
            ranks = _wait_for_step(launcher, out, set(ranks))
        except (RuntimeError, TimeoutError):
            break
        seconds.append(time.monotonic() - killed)
    return seconds


def _wait_for_step(launcher: subprocess.Popen[bytes], out: Path, before: set[int]) -> list[int]:
    """The ranks of a new attempt, once it has recorded a step."""
    deadline, seen = time.monotonic() + 120, None
    while launcher.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        ranks = sorted(_ranks(launcher))
        if len(ranks) == 2 and before.isdisjoint(ranks):
            lines = _lines(out)
            seen = lines if seen is None or lines < seen else seen  # the records are rewound when it starts
            if lines > seen:
                return ranks
        time.sleep(0.02)
    raise RuntimeError


def _ranks(launcher: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if b"fnrecipe.cli" in _command(child)]


def _command(process: str) -> bytes:
    """Its command line; nothing if it has just ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _lines(out: Path) -> int:
    path = out / "metrics/train.jsonl"
    return len([line for line in path.read_text().splitlines() if _whole(line)]) if path.exists() else 0


def _whole(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False
