"""Peak memory of a train step, above what the process holds before it: parameters, optimizer state and batch.

Linux only: after a warm-up step, freed memory is given back, the kernel's high-water mark is reset and one step measured.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Result
from benchmarks.step import CASES, System, make_batches, make_step
from benchmarks.workers import status

SYSTEMS = {
    "plain torch": System(),
    "plain torch, 8 micro-batches": System(num_leaves=8),
    "fnrecipe, untraced, 1 leaf": System(fnrecipe=True, traced=False),
    "fnrecipe, 1 leaf": System(fnrecipe=True),
    "fnrecipe, 8 leaves": System(fnrecipe=True, num_leaves=8),
}


def run(rounds: int) -> list[Result]:
    return [
        Result("memory", case, system, "peak above the start", [_in_process(system, case) for _ in range(rounds)], "MiB")
        for case in CASES
        for system in SYSTEMS
    ]


def _in_process(system: str, case: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", system, case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak(system: str, case: str) -> float:
    step = make_step(CASES[case], SYSTEMS[system])
    first, second = make_batches(2)
    step(first)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step(second)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
