"""Peak memory of a train step, above what the process holds before it: parameters, optimizer state and batch.

Linux only: after a warm-up step, freed memory is given back, the kernel's high-water mark is reset and one step measured.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CASES, byte_batches
from benchmarks.peers import fnrecipe, plain
from benchmarks.report import Result
from benchmarks.workers import status
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.nn.policy import Policy

SYSTEMS: dict[str, Callable[[LlamaConfig], Callable[[Batch], Tensor]]] = {
    "plain torch": plain.make_step,
    "plain torch, 8 microbatches": partial(plain.make_step, num_microbatches=8),
    "fnrecipe, untraced, 1 leaf": partial(fnrecipe.make_step, level="off"),
    "fnrecipe, 1 leaf, whole logits": partial(fnrecipe.make_step, policy=Policy()),
    "fnrecipe, 1 leaf": fnrecipe.make_step,
    "fnrecipe, 1 leaf, selective": partial(fnrecipe.make_step, policy=Policy(remat="selective", logits_at_once=256)),
    "fnrecipe, 1 leaf, layerwise": partial(fnrecipe.make_step, policy=Policy(remat="layerwise", logits_at_once=256)),
    "fnrecipe, 1 leaf, bfloat16": partial(fnrecipe.make_step, policy=Policy(torch.bfloat16, logits_at_once=256)),
    "fnrecipe, 1 leaf, all bfloat16": partial(
        fnrecipe.make_step, policy=Policy(torch.bfloat16, logits_at_once=256), dtype=torch.bfloat16
    ),
    "fnrecipe, 8 leaves": partial(fnrecipe.make_step, num_microbatches=8),
}
MODELS = ("3M, bytes", "7M")


def run(rounds: int) -> list[Result]:
    return [
        Result("memory", case, system, "peak above the start", [_in_process(system, case) for _ in range(rounds)], "MiB")
        for case in MODELS
        for system in SYSTEMS
    ]


def _in_process(system: str, case: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", system, case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak(system: str, case: str) -> float:
    step = SYSTEMS[system](CASES[case].config)
    first, second = byte_batches(2)
    step(first)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step(second)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
