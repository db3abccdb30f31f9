"""Checkpoints: seconds that a step waits for a save, and until it is on disk, beside torch.distributed.checkpoint (DCP).

A state of `--megabytes` (AdamW: parameters and two moments, 50 tensors of each, in float32) is saved by each system in turn,
in one process on the CPU; a round that is not counted makes the buffers that are kept from save to save. `stalled` is the time
until the state may change, `saved` that until the checkpoint is complete, CPU that of the process until then. All systems sync
their files; fnrecipe's also checks that the state is finite, and takes the SHA-256 of all bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.report import Result, ratios
from fnrecipe import optim, random, tree
from fnrecipe.config import RegimeSection
from fnrecipe.observe import Tick
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.gang import Gang
from fnrecipe.shell.saving.save import Saver
from fnrecipe.step import init_state

_TENSORS = 50
Save = Callable[[Path, int], Callable[[], None]]
"""(folder, step) -> what waits until the checkpoint is there."""


def run(rounds: int, megabytes: float = 1400.0) -> list[Result]:
    elements = int(megabytes * 1e6 / (3 * 4 * _TENSORS))
    params = {str(number): torch.randn(elements) for number in range(_TENSORS)}
    state = init_state(params, optim.scale_by_adam(), random.key(0))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    stager = DefaultStager(StagingOptions(False, False, False, False))  # what it can do without CUDA
    systems: dict[str, Save] = {
        "fnrecipe, waiting": _fnrecipe(state, beside=False),
        "fnrecipe, beside": _fnrecipe(state, beside=True),
        "dcp.save": partial(_dcp, tree.paths(state), None),
        "dcp.async_save": partial(_dcp, tree.paths(state), stager),
    }
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + rounds):
            for system, save in systems.items():
                for leaf in tree.leaves(state):
                    leaf.mul_(1)  # as a step does just before: no system finds memory of which the machine has lost sight
                for metric, seconds in _timed(save, Path(folder), 1 + number).items():
                    found.setdefault((system, metric), []).extend([seconds] * (number > 0))
    stager.close()
    dist.destroy_process_group()
    case = f"{megabytes:,.0f} MB"
    results = [Result("saving", case, system, metric, values, "s") for (system, metric), values in found.items()]
    return [*results, *ratios(results, "saved", "dcp.save")]


def _timed(save: Save, folder: Path, step: int) -> dict[str, float]:
    began, worked = time.perf_counter(), time.process_time()
    wait = save(folder, step)
    stalled = time.perf_counter() - began
    wait()
    saved, worked = time.perf_counter() - began, time.process_time() - worked
    for path in folder.iterdir():
        shutil.rmtree(path)
    os.sync()  # or the disk removes it while the next one saves
    return {"stalled": stalled, "saved": saved, "CPU": worked}


def _fnrecipe(state: Any, beside: bool) -> Save:
    """By what saves in a run, without the rest of it."""
    session: Any = SimpleNamespace(gang=Gang(), beside=Gang(), mesh=Mesh(), facts={}, display=SimpleNamespace(line=print))
    regime = RegimeSection(num_steps=1, checkpoint_in_background=beside, keep_last_n_checkpoints=1)
    session.config = SimpleNamespace(regime=regime)
    session.recipe = SimpleNamespace(update=lambda config: optim.adamw(optim.constant(1e-3)))
    saver: Saver[Any] = Saver(session, None)

    def save(folder: Path, step: int) -> Callable[[], None]:
        (folder / "run").mkdir()
        session.out = folder / "run"
        saver.save(Tick(step, None, states=[state]))
        return saver.wait

    return save


def _dcp(tensors: dict[str, Any], stager: DefaultStager | None, folder: Path, step: int) -> Callable[[], None]:
    path = folder / f"step {step}"
    if stager is None:
        dcp.save(tensors, checkpoint_id=path)
        return lambda: None
    saving: Any = dcp.async_save(tensors, checkpoint_id=path, async_stager=stager)
    return lambda: saving.result()
