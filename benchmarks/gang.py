"""Ranks over gloo on this machine: each way to share a step, its CPU time, its traffic and its memory.

The same Llama on the same packed rows in every system, one microbatch a rank, fp32, AdamW, clipping, one thread a rank. All
systems live in the same processes and take turns. Traffic is what crosses the loopback interface, over all ranks; CPU
seconds are those of all ranks. `memory` is the peak of rank 0 in a step of two microbatches a rank, its state included, beside
what arithmetic says.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cases import CASES, byte_batches
from benchmarks.plain import PlainLlama
from benchmarks.report import Result, ratios
from benchmarks.workers import status
from fnrecipe import optim, random, tree
from fnrecipe.config import GangSection
from fnrecipe.data import Batch
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.models.parameters import shapes
from fnrecipe.optim import schedule
from fnrecipe.parallel.mesh import is_shard
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit

FNRECIPE: dict[str, dict[str, Any]] = {
    "fnrecipe, replicate": {},
    "fnrecipe, replicate, fast": {"reduction": "fast"},
    "fnrecipe, zero1": {"sharding": "zero1"},
    "fnrecipe, zero2": {"sharding": "zero2"},
    "fnrecipe, fsdp": {"sharding": "fsdp"},
    "fnrecipe, fsdp, fast": {"sharding": "fsdp", "reduction": "fast"},
    "fnrecipe, tensor parallel": {"tensor_parallel_size": 2},
}
TORCH = ("torch, DDP", "torch, FSDP2", "torch, FSDP2 and checkpointing")
BASE, MODEL, STEPS = "torch, DDP", CASES["7M"].config, 2
M_MMAP_THRESHOLD = -3
WIDE = LlamaConfig(
    vocab_size=8192,
    max_seq_len=64,
    model_dim=512,
    num_layers=8,
    num_attn_heads=8,
    num_key_value_heads=8,
    ffn_inner_dim=1376,
)
"""A model whose parameters outweigh everything else in a step of 64 tokens."""


def run(rounds: int) -> list[Result]:
    return [result for size in (2, 4) for result in _speed(size, rounds)] + _memory()


def _speed(size: int, rounds: int) -> list[Result]:
    systems = [*FNRECIPE, *TORCH]
    figures = on_ranks(size, _take_turns, systems, rounds)
    results = [
        Result("gang", f"{size} ranks", system, metric, figures[system][metric], unit)
        for system in systems
        for metric, unit in (("CPU seconds a step", "s"), ("seconds a step", "s"), ("traffic a step", "MB"))
    ]
    return results + ratios(results, "CPU seconds a step", BASE) + ratios(results, "traffic a step", BASE)


def _memory() -> list[Result]:
    results = []
    for sharding in ("replicate", "zero1", "zero2", "fsdp"):
        for size in (1, 2, 4):
            case, system = f"{size} ranks", f"fnrecipe, {sharding}"
            results.append(Result("gang", case, system, "memory, predicted", [_predicted(sharding, size)], "MB"))
            results.append(Result("gang", case, system, "memory", [on_ranks(size, _peak, sharding)], "MB"))
    return results


def _predicted(sharding: str, size: int) -> float:
    """Parameters, two moments and the sum of gradients, and what is whole of them besides; MB, without activations."""
    sizes = {path: 4e-6 * torch.Size(shape).numel() for path, shape in _shapes().items()}
    whole = sum(sizes.values())
    layer = sum(size for path, size in sizes.items() if path.startswith("layers.0."))
    around = whole - WIDE.num_layers * layer
    if size == 1:
        return 5 * whole  # the second leaf's gradient is added when all of it is there
    if sharding == "replicate":
        return 4 * whole
    if sharding == "zero1":
        return 3 * whole / size + 2 * whole  # parameters and the sum of gradients are whole
    if sharding == "zero2":
        return 4 * whole / size + whole + 2 * layer  # parameters are whole, and the gradients on their way
    return 4 * whole / size + 1.5 * around + 4 * layer  # embedding and head, parameters and gradients of two layers


def _shapes() -> dict[str, Sequence[int]]:
    def paths(node: Any, path: str) -> dict[str, Sequence[int]]:
        if isinstance(node, tuple):
            return {path: node}
        return {name: shape for key, child in node.items() for name, shape in paths(child, f"{path}.{key}".strip(".")).items()}

    return paths(shapes(llama.parameters(WIDE), WIDE.num_layers), "")


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(rank, size, *args)` gives on rank 0, in fresh processes."""
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("localhost", 0))
        port, result = listener.getsockname()[1], Path(folder, "result.json")
        listener.close()
        multiprocessing.spawn(_joined, (size, port, str(result), function, args), nprocs=size)
        return json.loads(result.read_text())


def _joined(rank: int, size: int, port: int, result: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = function(rank, size, *args)
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _take_turns(rank: int, size: int, systems: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    host.keep_freed_memory()
    rows = _batches(STEPS)
    steps = {system: _make(system, rank, size) for system in systems}
    found: dict[str, dict[str, list[float]]] = {system: {} for system in systems}
    for number in range(1 + rounds):
        for system, step in steps.items():
            figures = measured(lambda step=step: [step(batch) for batch in rows])  # type: ignore[misc]
            for metric, value in figures.items() if number else ():
                found[system].setdefault(metric, []).append(value / STEPS)
    return found


def measured(work: Callable[[], Any]) -> dict[str, float]:
    dist.barrier()
    traffic, cpu, wall = _loopback(), time.process_time(), time.perf_counter()
    work()
    used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.barrier()
    wall, traffic = time.perf_counter() - wall, _loopback() - traffic
    dist.all_reduce(used)
    return {"CPU seconds a step": used.item(), "seconds a step": wall, "traffic a step": traffic / 1e6}


def _loopback() -> int:
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _make(system: str, rank: int, size: int) -> Callable[[Batch], Any]:
    if system in FNRECIPE:
        return _fnrecipe(MODEL, rank, size, FNRECIPE[system])[0]
    return _torch(MODEL, system, rank, size)


def _fnrecipe(
    config: LlamaConfig, rank: int, size: int, options: dict[str, Any], leaves: int = 1
) -> tuple[Callable[[Batch], Any], State]:
    mesh = make_mesh(
        GangSection(num_microbatches=leaves * size, **options), Gang(rank, size), torch.device("cpu"), llama.rules(config)
    )
    update = optim.adamw(schedule.cosine_annealing(3e-4, num_warmup_steps=10, num_steps=1000, final_scale=0.1), max_norm=1.0)
    key = random.key(0)
    state = init_state(llama.init(config, key, mesh.cut), update, key)
    ranks = mesh.replica.size * mesh.shard.size
    step = jit(train_step(next_token_loss(partial(llama.apply, config)), update, leaves, mesh), donate=1)
    number = mesh.replica.index * mesh.shard.size + mesh.shard.index
    return lambda batch: step(state, _rows(batch, number, ranks)), state


def _batches(number: int) -> list[Batch]:
    return [tree.from_numpy(batch) for batch in byte_batches(number)]


def _rows(batch: Batch, number: int, ranks: int) -> Batch:
    mine: Batch = tree.map(lambda leaf: leaf.chunk(ranks)[number], batch)
    return mine


def _torch(config: LlamaConfig, system: str, rank: int, size: int) -> Callable[[Batch], Any]:
    torch.manual_seed(0)
    model: Any = PlainLlama(config)
    if system == "torch, DDP":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (size,))
        for number, block in enumerate(model.blocks):
            model.blocks[number] = checkpoint_wrapper(block) if "checkpointing" in system else block
            fully_shard(model.blocks[number], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=system == "torch, DDP"
    )

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        mine = _rows(batch, rank, size)
        logits = model(mine.tokens, mine.segments, mine.positions)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.where(mine.mask, mine.targets, -100).flatten(), reduction="sum")
        (loss * size / batch.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _peak(rank: int, size: int, sharding: str) -> float:
    """The peak of a step of this rank, its state included, without what else the process holds; MB."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that what is freed is gone, and not a hole in the heap
    step, state = _fnrecipe(WIDE, rank, size, {"sharding": sharding}, leaves=2)
    batch: Batch = tree.map(lambda leaf: leaf[:, :64].contiguous() if leaf.ndim > 1 else leaf, _batches(1)[0])
    batch = tree.map(lambda leaf: leaf[: 2 * size], batch)
    step(batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    mine = sum(tree.leaves(leaf)[0].nbytes for leaf in tree.leaves(state, is_shard)) / 2**20
    other = status("VmRSS") - mine
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    step(batch)
    return (status("VmHWM") - other) * 2**20 / 1e6
