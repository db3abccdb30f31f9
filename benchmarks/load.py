"""From a directory of Hugging Face to the first step: seconds and peak memory of fresh processes, here and in transformers.

The directory has random weights of the shape of SmolLM2-135M, or is the one that `--directory` names. Its files are in the page
cache. The step is AdamW on one row of 64 tokens. Seconds count from the start of the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.report import Result
from benchmarks.workers import status

ARCH, LENGTH = "smollm2_135m", 64
Measured = dict[str, float]


def run(rounds: int, directory: Path | None = None) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        path = directory or _random(Path(folder) / ARCH)
        found: dict[str, list[Measured]] = {system: [] for system in SYSTEMS}
        for number in range(1 + rounds):
            for system in SYSTEMS:
                measured = _in_process(system, path)
                if number:
                    found[system].append(measured)
    units = {"to the weights": "s", "to the first step": "s", "CPU to the first step": "s", "peak memory": "MiB"}
    return [
        Result("load", path.name, system, metric, [measured[metric] for measured in rows], unit)
        for system, rows in found.items()
        for metric, unit in units.items()
    ]


def _random(path: Path) -> Path:
    from fnrecipe import random
    from fnrecipe.config import ModelSection, TokenizerSection
    from fnrecipe.interop.hugging_face.export import export
    from fnrecipe.models.model import find_model
    from fnrecipe.parallel.mesh import replicated

    section = ModelSection(name=ARCH)
    params = find_model(section.family).init(section.config, random.key(0), replicated)
    export(path, section, TokenizerSection(), params, dtype=None, shard_size=10**10)
    return path


def _in_process(system: str, path: Path) -> Measured:
    command = [sys.executable, "-m", "benchmarks.load", system, str(path)]
    measured: Measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def _fnrecipe(path: str, weights: Callable[[], None], traced: bool) -> None:
    import torch

    from fnrecipe import build, data, presets, random, tree
    from fnrecipe.config import LRSchedulerSection, ModelSection, OptimizerSection, RegimeSection, TrainerSection
    from fnrecipe.interop import pretrained
    from fnrecipe.models.next_token import next_token_loss
    from fnrecipe.parallel.mesh import replicated
    from fnrecipe.step import init_state, train_step
    from fnrecipe.transforms import jit

    section, trainer = ModelSection(path=path), TrainerSection()
    key = random.key(0)
    params = pretrained(section, key, replicated)
    weights()
    update = presets.update(OptimizerSection(), LRSchedulerSection(), trainer, RegimeSection(num_steps=10))
    step = train_step(next_token_loss(presets.apply(section, trainer, "document")), update, num_microbatches=1)
    ids = torch.arange(1, LENGTH + 2).numpy().astype("int32")
    batch = build.to_host(data.collate([(data.Tokens(ids, LENGTH),)], LENGTH), torch.device("cpu"))
    _, metrics = (jit(step, donate=1) if traced else step)(init_state(params, update, key), batch)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(metrics))


def _transformers(path: str, weights: Callable[[], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(1, LENGTH + 2)[None]
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert loss.isfinite()


SYSTEMS: dict[str, Callable[[str, Callable[[], None]], None]] = {
    "transformers, plain step": _transformers,
    "fnrecipe, untraced": partial(_fnrecipe, traced=False),
    "fnrecipe": partial(_fnrecipe, traced=True),
}


def _measure(system: str, path: str) -> Measured:
    from fnrecipe.runtime.host import process_started

    began, times = process_started(), list[float]()
    SYSTEMS[system](path, lambda: times.append(time.monotonic()))
    end = time.monotonic()
    return {
        "to the weights": times[0] - began,
        "to the first step": end - began,
        "CPU to the first step": time.process_time(),
        "peak memory": status("VmHWM"),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
