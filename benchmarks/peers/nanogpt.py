"""nanoGPT: its model, optimizer and loss, the order of its training loop. PYTHONPATH must name a clone of it.

GPT-2's layers: learned positions, layer norms and GELU four times as wide, which is as many products as a Llama whose
feed-forward is 8/3 as wide; the head is tied. It knows no documents, and so attends across them within a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from model import GPT, GPTConfig
from torch import Tensor

from benchmarks.peers.plain import tensors
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig


def make_step(
    config: LlamaConfig, *, compiled: bool = False, half: bool = False, device: torch.device | None = None
) -> Callable[[Batch], Tensor]:
    """`half` computes in bfloat16, by autocast."""
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    sizes = GPTConfig(config.max_seq_len, config.vocab_size, config.num_layers, config.num_attn_heads, config.model_dim)
    sizes.bias = False
    model = GPT(sizes).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)
    forward = torch.compile(model) if compiled else model

    def step(batch: Batch) -> Tensor:
        tokens, _, _, targets, mask = tensors(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            _, loss = forward(tokens, torch.where(mask, targets, -1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        detached: Tensor = loss.detach()
        return detached

    return step
