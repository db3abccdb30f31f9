"""fnrecipe's step, as `fnrecipe train` makes it; it also takes sums, checks that all is finite and can skip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.build import for_mode
from fnrecipe.compiler import cuda_graph
from fnrecipe.compiler.modes import BACKENDS, JitMode
from fnrecipe.data import Batch
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.attention import AttentionScope
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import schedule
from fnrecipe.runtime.products import measured
from fnrecipe.step import State, Step, init_state, train_step
from fnrecipe.transforms import jit

DEFAULT = Policy(logits_at_once=1024)


def make_step(
    config: LlamaConfig, *, level: JitMode = "trace", captured: bool = False, **options: Any
) -> Callable[[Batch], Tensor]:
    """`captured`: as a CUDA graph. `options` are those of `step_and_state`."""
    function, state = step_and_state(config, level=level, **options)
    if level != "off":
        backend = partial(BACKENDS[level], choose=measured)
        function = jit(function, donate=1, backend=cuda_graph(backend) if captured else backend)

    def step(batch: Batch) -> Tensor:
        _, metrics = function(state, tree.from_numpy(batch))
        loss: Tensor = metrics["loss"] / metrics["targets"]
        return loss

    return step


def step_and_state(
    config: LlamaConfig,
    *,
    num_microbatches: int = 1,
    level: JitMode = "trace",
    policy: Policy = DEFAULT,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    scope: AttentionScope = "document",
) -> tuple[Step, State]:
    """The step before it is traced, and the state that it begins with.

    `dtype` is that of the parameters, `scope` what a position sees.
    """
    constant = schedule.cosine_annealing(3e-4, num_warmup_steps=0, num_steps=1000, final_scale=1.0)
    update = for_mode(optim.adamw(constant, max_norm=1.0), level, device or torch.device("cpu"))
    key = random.key(0, device)
    state = init_state(llama.init(config, key, lambda path, leaf: leaf.to(dtype)), update, key)
    return train_step(
        next_token_loss(partial(llama.apply, config, policy=policy, scope=scope)), update, num_microbatches
    ), state
