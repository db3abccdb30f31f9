"""The train step: tokens per CPU second and per second, against a plain `nn.Module` and `torch.optim.AdamW(fused=True)`.

Every system trains the same model on the same packed rows with the same document mask: 8 rows of 256, fp32, clipping by
global norm, as one batch or as 8 micro-batches whose gradients are summed (fnrecipe's default: a fixed tree of 8 leaves).
fnrecipe's step also takes sums, checks that all is finite and can skip. It runs as `fnrecipe train` runs it, in a process
that keeps freed memory; `keeping memory` is the plain loop in such a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F

from benchmarks.plain import PlainLlama
from benchmarks.report import Result, ratios
from benchmarks.workers import take_turns
from fnrecipe import host, optim, random, schedule, tree
from fnrecipe.config import LlamaConfig
from fnrecipe.data import Batch, Place
from fnrecipe.loss import next_token_loss
from fnrecipe.models import llama
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit


@attrs.frozen
class System:
    fnrecipe: bool = False
    num_leaves: int = 1
    keep_memory: bool = False
    compiled: bool = False
    traced: bool = True


STEPS = 4
BASES = {1: "plain torch", 8: "plain torch, 8 micro-batches"}
SYSTEMS = {
    "plain torch": System(),
    "plain torch, keeping memory": System(keep_memory=True),
    "plain torch, compiled": System(compiled=True),
    "plain torch, 8 micro-batches": System(num_leaves=8),
    "plain torch, 8 micro-batches, keeping memory": System(num_leaves=8, keep_memory=True),
    "fnrecipe, 1 leaf": System(fnrecipe=True, keep_memory=True),
    "fnrecipe, 8 leaves": System(fnrecipe=True, num_leaves=8, keep_memory=True),
}
CASES = {
    "3M, bytes": defaults.model.config,
    "7M, vocabulary 8192": attrs.evolve(defaults.model.config, vocab_size=8192, tied_embeddings=False, num_key_value_heads=4),
}


def run(rounds: int) -> list[Result]:
    results: list[Result] = []
    ratios_to_base: list[Result] = []
    for case in CASES:
        measured = take_turns("step", list(SYSTEMS), case, rounds)
        for system, turns in measured.items():
            make = partial(Result, "step", case, system)
            results.append(make("per CPU second", [t.amount / t.cpu for t in turns], "tokens"))
            results.append(make("per second", [t.amount / t.wall for t in turns], "tokens"))
            results.append(make("peak memory of the process", [turns[-1].peak], "MiB"))
    for num_leaves, base in BASES.items():
        equal_work = [result for result in results if SYSTEMS[result.system].num_leaves == num_leaves]
        for metric in ("per CPU second", "per second"):
            ratios_to_base += ratios(equal_work, metric, base)
    return results + ratios_to_base


def setup(system: str, case: str) -> Callable[[], float]:
    options, config = SYSTEMS[system], CASES[case]
    if options.keep_memory:
        host.keep_freed_memory()
    step, batches = make_step(config, options), make_batches(STEPS)

    def work() -> float:
        for batch in batches:
            step(batch)
        return float(sum(batch.mask.sum() for batch in batches))

    return work


def make_step(config: LlamaConfig, system: System) -> Callable[[Batch], Any]:
    return (_fnrecipe_step if system.fnrecipe else _plain_step)(config, system)


def make_batches(number: int) -> list[Batch]:
    stream = train_stream(defaults, Place())(None)
    return [tree.map(torch.from_numpy, next(stream)[0]) for _ in range(number)]


def _fnrecipe_step(config: LlamaConfig, system: System) -> Callable[[Batch], Any]:
    learning_rate = schedule.cosine_annealing(3e-4, num_warmup_steps=10, num_steps=1000, final_scale=0.1)
    update = optim.adamw(learning_rate, max_norm=1.0)
    key = random.key(0)
    state = init_state(llama.init(config, key), update, key)
    step = train_step(next_token_loss(partial(llama.apply, config)), update, system.num_leaves)
    step = jit(step, donate=1) if system.traced else step
    return lambda batch: step(state, batch)


def _plain_step(config: LlamaConfig, system: System) -> Callable[[Batch], Any]:
    torch.manual_seed(0)
    model = PlainLlama(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if system.compiled else model

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        targets = torch.where(batch.mask, batch.targets, -100)
        parts = zip(
            *(x.chunk(system.num_leaves) for x in (batch.tokens, batch.segments, batch.positions, targets)), strict=True
        )
        for tokens, segments, positions, wanted in parts:
            logits = forward(tokens, segments, positions)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
            (loss / batch.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step
