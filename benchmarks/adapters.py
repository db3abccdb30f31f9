"""Training all of a model of SmolLM2-135M's shape, and adapters beside it: the state, the peak of a step, its CPU time.

Linux only: the peak is the kernel's high-water mark over a second step, above what the process held before the state.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.report import Result
from benchmarks.workers import status
from fnrecipe import tree
from fnrecipe.build import init_train_state, make_step
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.products import measured

SHAPE = [
    "model.name=smollm2_135m",
    "gang={device: cpu, num_microbatches: 1}",
    "dataset={max_seq_len: 512, batch_size: 2, num_lanes: 2}",
    "trainer.logits_at_once=256",
]
BFLOAT16 = ["trainer.dtype=bfloat16", "model.dtype=bfloat16"]
SYSTEMS = {
    "all parameters": [],
    "LoRA": ["model.adapter.name=lora"],
    "DoRA": ["model.adapter.name=dora"],
    "LoRA, layerwise": ["model.adapter.name=lora", "trainer.activation_checkpointing.mode=layerwise"],
    "all parameters, bfloat16": BFLOAT16,
    "LoRA, base in bfloat16": [*BFLOAT16, "model.adapter.name=lora"],
}
UNITS = {"trained": "M parameters", "state": "MiB", "peak": "MiB", "CPU time of a step": "s"}


def run(rounds: int) -> list[Result]:
    found = {system: [_in_process(system) for _ in range(rounds)] for system in SYSTEMS}
    return [
        Result("adapters", "135M, 2 x 512", system, quantity, [measured[quantity] for measured in each], unit)
        for system, each in found.items()
        for quantity, unit in UNITS.items()
    ]


def _in_process(system: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.adapters", system]
    values: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return values


def _measure(system: str) -> dict[str, float]:
    config, _ = resolve(recipe.config, pairs=[*SHAPE, *SYSTEMS[system]])
    device, stream = torch.device("cpu"), recipe.stream(config, LaneAssignment())(None)
    first, second = (tree.from_numpy(next(stream)[0]) for _ in range(2))
    before = status("VmRSS")
    state = init_train_state(recipe, config, Mesh(), device)
    step = make_step(recipe, config, Mesh(), device, choose=measured)
    moments = [leaf for path, leaf in tree.paths(state.optimizer).items() if "mean." in path]
    size = sum(leaf.nbytes for leaf in tree.leaves(state))
    state, _ = step(state, first)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    step(state, second)
    taken = time.process_time() - began
    trained = sum(leaf.numel() for leaf in moments) / 1e6
    return dict(zip(UNITS, (trained, size / 2**20, status("VmHWM") - before, taken), strict=True))


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
