"""The train step: a Llama of each size in fnrecipe, in plain torch and in other frameworks.

All train on the same packed rows with the same document mask (but litgpt, which has none): fp32, AdamW, clipping by global
norm, as one batch or as 8 microbatches whose gradients are summed (fnrecipe's default: a fixed tree of 8 leaves). Each round
of each system is a fresh process: a first step, then those that are timed. fnrecipe runs as `fnrecipe train` runs it, in a
process that keeps freed memory and collects no garbage before the end of its first step; `keeping memory` is another system
in a process that keeps it. The losses of the last step show that all do the same work.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks import cases
from benchmarks.report import Result, ratios
from benchmarks.workers import status

ROOT = Path(__file__).parent.parent


@attrs.frozen
class System:
    """The module of `benchmarks.peers` and the arguments of its `make_step`, and the packages that it needs."""

    peer: str
    packages: tuple[str, ...] = ("torch",)
    arguments: Mapping[str, Any] = {}
    eager: bool = False
    keep_memory: bool = False

    @property
    def num_microbatches(self) -> int:
        return int(self.arguments.get("num_microbatches", 1))


HUGGING_FACE = ("torch", "transformers", "accelerate")
NANOGPT = ("torch", "model")
FAIRSEQ2 = ("torch", "fairseq2", "fairseq2n")
COMPILED = "plain torch, compiled"
SYSTEMS = {
    "plain torch": System("plain", eager=True),
    "plain torch, keeping memory": System("plain", eager=True, keep_memory=True),
    COMPILED: System("plain", arguments={"compiled": True}),
    "plain torch, compiled, keeping memory": System("plain", arguments={"compiled": True}, keep_memory=True),
    "transformers, own loop": System("transformers", HUGGING_FACE, eager=True),
    "transformers, Trainer": System("transformers", HUGGING_FACE, {"trainer": True}, eager=True),
    "litgpt, own loop": System("litgpt", ("torch", "litgpt"), eager=True),
    "nanoGPT": System("nanogpt", NANOGPT, eager=True),
    "nanoGPT, compiled": System("nanogpt", NANOGPT, {"compiled": True}),
    "fairseq2, one packed row": System("fairseq2", FAIRSEQ2, {"packed": True}, eager=True),
    "fairseq2, rows": System("fairseq2", FAIRSEQ2, {"packed": False}, eager=True),
    "jax and optax": System("jax", ("jax", "optax")),
    "fnrecipe, 1 leaf": System("fnrecipe", keep_memory=True),
    "fnrecipe, 1 leaf, inductor": System("fnrecipe", arguments={"level": "inductor"}, keep_memory=True),
    "plain torch, 8 microbatches": System("plain", arguments={"num_microbatches": 8}, eager=True),
    "plain torch, 8 microbatches, keeping memory": System(
        "plain", arguments={"num_microbatches": 8}, eager=True, keep_memory=True
    ),
    "fnrecipe, 8 leaves": System("fnrecipe", arguments={"num_microbatches": 8}, keep_memory=True),
}
SPEEDS = ("per CPU second", "per second")
UNITS = {
    **dict.fromkeys(SPEEDS, "tokens"),
    "peak memory of the process": "MiB",
    "from the start to the first step": "s",
    "loss of the last step": "nats",
}


def run(
    rounds: int, models: Sequence[str] = (), pythons: Mapping[str, str] | None = None, systems: Sequence[str] = ()
) -> list[Result]:
    """`models` names cases and `systems` systems, all by default; `pythons` names the Python of peers that need their own."""
    chosen = {name: SYSTEMS[name] for name in systems or SYSTEMS}
    runs = {name: (pythons or {}).get(system.peer, sys.executable) for name, system in chosen.items()}
    found = {name: python for name, python in runs.items() if has_packages(python, SYSTEMS[name].packages)}
    with tempfile.TemporaryDirectory() as folder:
        cases.write(Path(folder))
        results = [result for case in models or cases.CASES for result in _measured(case, found, folder, rounds)]
    missing = [Result("step", "all", name, "not installed", [], "") for name in chosen if name not in found]
    return [*results, *missing]


def _measured(case: str, pythons: Mapping[str, str], folder: str, rounds: int) -> list[Result]:
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(rounds):
        for name, python in pythons.items():
            figures[name].append(_in_process(python, name, case, folder))
    results = [
        Result("step", case, name, metric, [figure[metric] for figure in turns], unit)
        for name, turns in figures.items()
        for metric, unit in UNITS.items()
    ]
    return results + [ratio for num_microbatches in (1, 8) for ratio in _ratios(results, num_microbatches)]


def _ratios(results: Sequence[Result], num_microbatches: int) -> list[Result]:
    """To the fastest eager system and to the compiled one, among those with as many microbatches, if there are any."""
    equal = [r for r in results if SYSTEMS[r.system].num_microbatches == num_microbatches]
    found = []
    for metric in SPEEDS:
        eager = [r for r in equal if r.metric == metric and SYSTEMS[r.system].eager]
        fastest = max(eager, key=lambda r: r.value or 0).system if eager else None
        for base in filter(None, (fastest, COMPILED)):
            found += ratios(equal, metric, base)
    return found


def has_packages(python: str, packages: Sequence[str]) -> bool:
    program = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return subprocess.run([python, "-c", program, *packages], check=False, cwd=tempfile.gettempdir()).returncode == 0


def _in_process(python: str, name: str, case: str, folder: str) -> dict[str, float]:
    command = [python, "-m", "benchmarks.step", name, case, folder]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def _measure(name: str, case: str, folder: str) -> dict[str, float]:
    system = SYSTEMS[name]
    if system.peer == "fnrecipe":
        gc.disable()  # as runs do up to the end of their first step
    if system.keep_memory:
        importlib.import_module("fnrecipe.runtime.host").keep_freed_memory()
    peer = importlib.import_module(f"benchmarks.peers.{system.peer}")
    step = peer.make_step(cases.CASES[case].config, **system.arguments)
    first, *batches = cases.read(cases.CASES[case], Path(folder))
    float(step(first))
    start = _age()
    gc.collect()
    gc.freeze()  # as runs do behind their first step: a full collection takes a fifth of a step
    gc.enable()
    cpu, wall = time.process_time(), time.perf_counter()
    losses = [float(step(batch)) for batch in batches]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = float(sum(batch.mask.sum() for batch in batches))
    return dict(zip(UNITS, (tokens / cpu, tokens / wall, status("VmHWM"), start, losses[-1]), strict=True))


def _age() -> float:
    """Seconds since this process was started, as Linux tells it."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
