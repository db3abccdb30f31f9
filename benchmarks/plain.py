"""The same Llama as a plain `torch.nn.Module`, for comparison: what somebody would write without fnrecipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from fnrecipe.models.llama import LlamaConfig


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attn_heads, config.num_key_value_heads
        width = config.model_dim // self.heads
        self.query = nn.Linear(config.model_dim, config.model_dim, bias=False)
        self.key = nn.Linear(config.model_dim, self.groups * width, bias=False)
        self.value = nn.Linear(config.model_dim, self.groups * width, bias=False)
        self.output = nn.Linear(config.model_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor:
        """`mask`: bool, or int32: where documents begin in the flattened rows, and how many positions there are."""
        rows, length, _ = x.shape

        def split(y: Tensor, number: int) -> Tensor:
            return y.view(rows, length, number, -1).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return y * cosines + torch.cat([-right, left], -1) * sines

        query, key = rotate(split(self.query(x), self.heads)), rotate(split(self.key(x), self.groups))
        key = key.repeat_interleave(self.heads // self.groups, 1)
        value = split(self.value(x), self.groups).repeat_interleave(self.heads // self.groups, 1)
        if mask is not None and mask.dtype == torch.int32:
            query, key, value = (y.transpose(1, 2).flatten(0, 1).to(value.dtype) for y in (query, key, value))
            mixed = varlen_attn(query, key, value, mask, mask, length, length, window_size=(-1, 0))
            assert isinstance(mixed, Tensor)  # the statistics are not asked for
            return self.output(mixed.view(rows, length, -1))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, -1))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.gate = nn.Linear(config.model_dim, config.ffn_inner_dim, bias=False)
        self.up = nn.Linear(config.model_dim, config.ffn_inner_dim, bias=False)
        self.down = nn.Linear(config.ffn_inner_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosines, sines, mask)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    cosines: Tensor
    sines: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.init_std)
        width = config.model_dim // config.num_attn_heads
        frequencies = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
        self.register_buffer("cosines", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sines", torch.cat([angles, angles], -1).sin())

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Logits; without `segments` each row is one document, and torch's causal kernel does without a mask.

        bounds: int32, where documents begin; torch's kernel for sequences of different lengths then needs no mask either.
        """
        length = tokens.shape[1]
        mask = bounds
        if segments is not None and bounds is None:
            causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
        places = torch.arange(length, device=tokens.device)[None] if positions is None else positions
        cosines, sines = self.cosines[places][:, None], self.sines[places][:, None]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cosines, sines, mask)
        return self.head(self.norm(x))
