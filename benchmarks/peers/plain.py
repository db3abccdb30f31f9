"""Plain torch: an `nn.Module` and the loop that somebody would write around it. Other torch models use the same loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import PlainLlama
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig

Forward: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens, segments, positions) -> logits"""


def make_step(config: LlamaConfig, *, num_microbatches: int = 1, compiled: bool = False) -> Callable[[Batch], Tensor]:
    torch.manual_seed(0)
    model = PlainLlama(config)
    return loop(model, model, num_microbatches=num_microbatches, compiled=compiled)


def loop(model: nn.Module, forward: Forward, *, num_microbatches: int = 1, compiled: bool = False) -> Callable[[Batch], Tensor]:
    """The step of `model`, whose logits `forward` gives; the gradients of `num_microbatches` microbatches are summed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(tokens: Tensor, segments: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        logits = forward(tokens, segments, positions)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    summed = torch.compile(loss) if compiled else loss

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        tokens, segments, positions, targets, mask = tensors(batch)
        count = mask.sum()
        total = torch.zeros((), device=tokens.device)
        for part in zip(*(x.chunk(num_microbatches) for x in (tokens, segments, positions, targets)), strict=True):
            mean = summed(*part) / count
            mean.backward()
            total += mean.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def tensors(batch: Batch) -> tuple[Tensor, ...]:
    """Tokens, segments, positions, targets (-100 where there is none) and mask."""
    fields = (batch.tokens, batch.segments, batch.positions, batch.targets, batch.mask)
    tokens, segments, positions, targets, mask = map(torch.as_tensor, fields)
    return tokens, segments, positions, torch.where(mask, targets, -100), mask
