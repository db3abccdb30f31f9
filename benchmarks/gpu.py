"""A train step on one GPU, in bf16: fnrecipe against a plain `nn.Module`, compiled and eager. Without CUDA: tiny, on the CPU.

The plain loop is one document a row with torch's causal attention, fused AdamW, bf16 by autocast (the largest model keeps
parameters and moments in bf16 as well, for 16 bytes a parameter would not fit); fnrecipe keeps both in float32, and runs as by
default, compiled and as a CUDA graph, if nothing else is named. `row` is attention as in the plain loop; without, it looks at
documents: one a row, or several in the cases of that name, where the plain loop has a mask. A token costs 6 FLOPs per parameter
in a matrix product and 12 * layers * width * length in attention, as if it were not causal, or half of that; utilisation is of
the dense bf16 peak. Tokens are random; the loss is that of the last step on one batch. Each system is a process of its own.
First each is run once, several side by side, so that what is compiled is on disk; then each is timed alone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from benchmarks.cases import llama_config
from benchmarks.peers import fnrecipe, plain
from benchmarks.plain import PlainLlama
from benchmarks.report import Result, ratios
from benchmarks.step import ROOT
from benchmarks.workers import status
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.data import Batch
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.nn.policy import Policy
from fnrecipe.runtime.host import use_deterministic_kernels
from fnrecipe.runtime.peaks import peak_flops

WARMUP, STEPS = 3, 10
HOW = Policy(torch.bfloat16, logits_at_once="auto", max_documents=8)
COMPILED, RAGGED_PLAIN = "plain torch, compiled", "plain torch, compiled, kernels for documents"
Step = Callable[[Batch], Tensor]


@attrs.frozen
class Case:
    """`documents`: of one row."""

    config: LlamaConfig
    rows: int
    systems: Sequence[str]
    parameters: torch.dtype = torch.float32
    cuda: bool = True
    documents: int = 1


def _plain(case: Case, device: torch.device, compiled: bool, ragged: bool = False) -> Step:
    torch.manual_seed(0)
    with device:
        model = PlainLlama(case.config).to(case.parameters)
    bounds = bounds_of(case).to(device) if ragged else None

    def forward(tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits: Tensor = model(tokens, *((segments, positions, bounds) if case.documents > 1 else ()))
            return logits

    return plain.loop(model, forward, compiled=compiled)


def _fnrecipe(
    case: Case, device: torch.device, jit: Literal["auto", "trace"] = "auto", captured: bool = True, **options: Any
) -> Step:
    given = {"policy": HOW, "device": device, "dtype": case.parameters, "captured": captured and case.cuda, **options}
    return fnrecipe.make_step(case.config, level=jit_mode(jit, device), **given)


def _deterministic(case: Case, device: torch.device) -> Step:
    use_deterministic_kernels()
    return _fnrecipe(case, device)


def _nanogpt(case: Case, device: torch.device) -> Step:
    from benchmarks.peers import nanogpt

    return nanogpt.make_step(case.config, compiled=True, half=True, device=device)


SYSTEMS: dict[str, Callable[[Case, torch.device], Step]] = {
    "plain torch, eager": lambda case, device: _plain(case, device, compiled=False),
    COMPILED: lambda case, device: _plain(case, device, compiled=True),
    RAGGED_PLAIN: lambda case, device: _plain(case, device, compiled=True, ragged=True),
    "nanoGPT, compiled": _nanogpt,
    "fnrecipe": _fnrecipe,
    "fnrecipe, row": partial(_fnrecipe, scope="row"),
    "fnrecipe, no CUDA graph": partial(_fnrecipe, captured=False),
    "fnrecipe, traced": partial(_fnrecipe, jit="trace"),
    "fnrecipe, the same bits each time": _deterministic,
    "fnrecipe, 32 documents a row at most": partial(_fnrecipe, policy=attrs.evolve(HOW, max_documents=32)),
}
LARGE = (COMPILED, "fnrecipe", "fnrecipe, row")
RAGGED = (COMPILED, RAGGED_PLAIN, "fnrecipe", "fnrecipe, 32 documents a row at most")
TINY = ("plain torch, eager", COMPILED, "fnrecipe")
GPT2 = llama_config(50_304, 1024, 768, 12, 12, 12, 2048, tied=True)
CASES = {
    "124M": Case(GPT2, 16, tuple(system for system in SYSTEMS if system != RAGGED_PLAIN)),
    "124M, 8 documents a row": Case(GPT2, 16, RAGGED, documents=8),
    "1.1B": Case(llama_config(32_000, 2048, 2048, 22, 32, 4, 5632), 4, LARGE),
    "6.7B": Case(llama_config(32_000, 2048, 4096, 32, 32, 32, 11_008), 1, LARGE, torch.bfloat16),
    "tiny": Case(llama_config(264, 32, 32, 2, 4, 2, 64, tied=True), 2, TINY, cuda=False),
}
"""GPT-2's size with Llama's layers; TinyLlama; Llama 2 7B."""


def run(rounds: int, *, minutes: float = 9.0) -> list[Result]:
    deadline = time.monotonic() + 60 * minutes
    on_gpu = torch.cuda.is_available()
    chosen = [(system, name) for name, case in CASES.items() if case.cuda == on_gpu for system in case.systems]
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    results = [Result("gpu", f"{card}, torch {torch.__version__}", "", "cards", [float(torch.cuda.device_count() or 1)], "")]
    if on_gpu:
        _prepare([entry for entry in chosen if CASES[entry[1]].config is GPT2], deadline)
    for system, name in chosen:
        results += _in_process(system, name, rounds, deadline - time.monotonic())
    return results + ratios(results, "per second", COMPILED)


def _prepare(chosen: Sequence[tuple[str, str]], deadline: float) -> None:
    """Runs systems once, several at the same time: what they compile is found on disk when they are timed."""
    # A system compiles in a process and in workers beside it: nine at once on 16 cores were not ready in two minutes.
    until = time.monotonic() + (deadline - time.monotonic()) / 2

    def once(entry: tuple[str, str]) -> None:
        with suppress(subprocess.TimeoutExpired):
            left = max(until - time.monotonic(), 0.1)
            subprocess.run([*_command(*entry), "0"], stdout=subprocess.DEVNULL, cwd=ROOT, timeout=left, check=False)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        list(pool.map(once, chosen))


def _command(system: str, case: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", system, case]


def _in_process(system: str, case: str, rounds: int, seconds: float) -> list[Result]:
    try:
        output = subprocess.run(
            [*_command(system, case), str(rounds)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=max(seconds, 0.1),
        ).stdout
    except subprocess.TimeoutExpired:
        return [Result("gpu", case, system, "no time left", [], "")]
    except subprocess.CalledProcessError as error:
        return [Result("gpu", case, system, f"ended with status {error.returncode}", [], "")]
    rows = json.loads(output.splitlines()[-1])
    return [Result("gpu", case, system, metric, values, unit) for metric, values, unit in rows]


def measure(system: str, case: Case, rounds: int) -> list[tuple[str, list[float], str]]:
    """Metric, a value a round (or one in all, or none where it does not fit), and unit."""
    torch.set_float32_matmul_precision("high")
    device, began = torch.device("cuda" if case.cuda else "cpu"), time.perf_counter()
    try:
        step, batch = SYSTEMS[system](case, device), batch_of(case, device)
        float(step(batch))
        first = time.perf_counter() - began
        speeds, loss = _speeds(step, batch, rounds)
    except torch.OutOfMemoryError:
        return [("out of memory", [], "")]
    except ModuleNotFoundError:
        return [("not installed", [], "")]
    peak = torch.cuda.max_memory_allocated() / 2**20 if case.cuda else status("VmHWM")
    rows = [("per second", speeds, "tokens"), ("peak memory", [peak], "MiB"), ("loss of the last step", [loss], "nats")]
    rows.append(("first step after", [first], "s"))
    if case.cuda:
        peak_rate = peak_flops(torch.cuda.get_device_name())
        assert llama.flops is not None
        flops = llama.flops(case.config, case.config.max_seq_len)
        for metric, each in (("of the dense bf16 peak", flops.full), ("of that, causal FLOPs", flops.causal)):
            rows.append((metric, [100 * speed * each / peak_rate for speed in speeds] if peak_rate else [], "%"))
    return rows


def _speeds(step: Step, batch: Batch, rounds: int) -> tuple[list[float], float]:
    """Tokens a second of each round of `STEPS` steps, and the last loss. Reading a loss waits for the device."""
    for _ in range(WARMUP):
        loss = step(batch)
    speeds, last = [], float(loss)
    gc.collect()
    gc.freeze()  # as runs do behind their first step: full collections in a round halved its speed
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(STEPS):
            loss = step(batch)
        last = float(loss)
        speeds.append(STEPS * batch.tokens.numel() / (time.perf_counter() - start))
    return speeds, last


def batch_of(case: Case, device: torch.device) -> Batch:
    length, bounds = case.config.max_seq_len, bounds_of_row(case)
    rows: Any = torch.randint(case.config.vocab_size, (case.rows, length + 1), generator=torch.Generator().manual_seed(0))
    tokens, targets = (x.contiguous().to(device) for x in (rows[:, :-1], rows[:, 1:]))
    segments = torch.cat([torch.full((end - first,), number) for number, (first, end) in enumerate(pairwise(bounds))])
    positions = torch.cat([torch.arange(end - first) for first, end in pairwise(bounds)])
    segments, positions = (x.to(device).expand_as(tokens).contiguous() for x in (segments, positions))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens, targets, segments, positions, torch.zeros_like(tokens), mask, num_bytes=mask.sum(1))


def bounds_of_row(case: Case) -> list[int]:
    """Where documents begin in each row, and its length."""
    length = case.config.max_seq_len
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(1))[: case.documents - 1] + 1
    return [0, *sorted(cuts.tolist()), length]


def bounds_of(case: Case) -> Tensor:
    """Where documents begin in the flattened rows, and how many positions there are, int32."""
    *starts, length = bounds_of_row(case)
    return torch.tensor([row * length + start for row in range(case.rows) for start in starts] + [case.rows * length]).int()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], CASES[sys.argv[2]], int(sys.argv[3]))))
