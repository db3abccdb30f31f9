"""litgpt: its GPT module in a loop of one's own. It knows no documents, and so attends across them within a row.

(`litgpt pretrain` itself reads only through litdata, which wants a CUDA build of torch by way of torchvision.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor

from benchmarks.peers.plain import loop
from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig


def make_step(config: LlamaConfig) -> Callable[[Batch], Tensor]:
    torch.manual_seed(0)
    model = GPT(_config(config))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=config.init_std)
    if config.tied_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return loop(model, lambda tokens, segments, positions: model(tokens))


def _config(config: LlamaConfig) -> Config:
    return Config(
        block_size=config.max_seq_len,
        padded_vocab_size=config.vocab_size,
        n_embd=config.model_dim,
        n_layer=config.num_layers,
        n_head=config.num_attn_heads,
        n_query_groups=config.num_key_value_heads,
        intermediate_size=config.ffn_inner_dim,
        norm_eps=config.norm_eps,
        rope_base=int(config.rope_theta),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
