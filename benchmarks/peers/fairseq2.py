"""fairseq2: its Llama with torch's attention, as its recipe has it where there is no flash attention, in a loop of one's own.

`packed` is the recipe's layout: all documents of a batch in one row, for which fairseq2 makes a mask that long and wide.
Otherwise rows stay rows and documents are not told apart, which is as much attention as in the other systems.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fairseq2.models.llama import LLaMAConfig
from fairseq2.models.llama.factory import create_llama_model
from fairseq2.models.transformer import TorchSDPA, set_default_sdpa_factory
from fairseq2.nn import BatchLayout
from torch import Tensor

from benchmarks.peers.plain import loop
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig


def make_step(config: LlamaConfig, *, packed: bool) -> Callable[[Batch], Tensor]:
    torch.manual_seed(0)
    set_default_sdpa_factory(TorchSDPA)
    model = create_llama_model(_config(config))

    def forward(tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        if not packed:
            logits: Tensor = model(tokens, BatchLayout.of(tokens))
            return logits
        row = tokens.flatten()
        logits = model(row, BatchLayout.of(row, _lengths(segments), packed=True))
        return logits.view(*tokens.shape, -1)

    return loop(model, forward)


def _lengths(segments: Tensor) -> list[int]:
    """Those of the documents, and of the padding, of all rows one behind the other."""
    return [int(length) for row in segments for length in torch.unique_consecutive(row, return_counts=True)[1]]


def _config(config: LlamaConfig) -> LLaMAConfig:
    return LLaMAConfig(
        model_dim=config.model_dim,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tied_embeddings,
        num_layers=config.num_layers,
        num_attn_heads=config.num_attn_heads,
        num_key_value_heads=config.num_key_value_heads,
        ffn_inner_dim=config.ffn_inner_dim,
        ffn_inner_dim_scale=1.0,
        ffn_inner_dim_multiple_of=1,
        rope_theta=config.rope_theta,
        init_std=config.init_std,
        init_std_scale="none",
    )
