"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and behind each branch, bounded scores and logits, GELUs.

Norms multiply by one more than their weights; embeddings are multiplied by the root of the model's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, DecoderConfig, Kind, Piece, make_model
from fnrecipe.models.gemma2.config import Gemma2Config, family, parameters
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.rope import Rope
from fnrecipe.nn.attention import AttentionMask
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def kind(config: Gemma2Config, number: int) -> Kind:
    sliding = (number + 1) % config.sliding_window_pattern
    return Kind(config.sliding_window if sliding else None, Rope(config.rope_theta, config.rope_scaling))


def embed(config: LlamaConfig, outer: Tree, tokens: Tensor, positions: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The root is rounded to the dtype of activations, as it was when Gemma was trained."""
    x = pieces.embed(config, outer, tokens, positions, dtype)
    return x * torch.full((), math.sqrt(config.model_dim), dtype=x.dtype, device=x.device)


def layer(config: Gemma2Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(heads, "attention_norm", "query", "key", "value")(x, angles)
    x = piece(attended, "attention_post_norm")(x, piece(pieces.mixed_down, "output")(attend(config, query, key, value, mask)))
    return feed_forward(piece, x)


def attend(config: Gemma2Config, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    scale, cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
    if cap is None:
        return nn.attention(query, key, value, mask, scale)
    return nn.softcapped_attention(query, key, value, mask, cap, scale)


def normed(config: DecoderConfig, weight: nn.Weight, x: Tensor) -> Tensor:
    return nn.rms_norm(x, weight, config.norm_eps, offset=1.0)


def heads(config: DecoderConfig, weights: Tree, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads of the normalised x, rotated."""
    x = nn.entered(normed(config, weights["attention_norm"], x), weights["query"])
    query, key, value = (pieces.split(config, projected) for projected in pieces.project(weights, x))
    return pieces.rotated(query, angles), pieces.rotated(key, angles), value


def attended(config: DecoderConfig, weights: Tree, x: Tensor, written: Tensor) -> Tensor:
    return x + normed(config, weights["attention_post_norm"], written)


def feed_forward(piece: Piece, x: Tensor) -> Tensor:
    written = piece(down, "down")(*piece(gated, "ffn_norm", "gate", "up")(x))
    out: Tensor = piece(fed, "ffn_post_norm")(x, written)
    return out


def gated(config: DecoderConfig, weights: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    return pieces.gate_and_up(config, weights, normed(config, weights["ffn_norm"], x))


def down(config: DecoderConfig, weights: Tree, gates: Tensor, values: Tensor) -> Tensor:
    return nn.linear(nn.geglu(gates, values), weights["down"])


def fed(config: DecoderConfig, weights: Tree, x: Tensor, written: Tensor) -> Tensor:
    return x + normed(config, weights["ffn_post_norm"], written)


def logits(config: Gemma2Config, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    head = outer.get("head", outer["embedding"])
    return nn.logits(normed(config, outer["norm"], x), head, chunk, config.final_logit_softcapping)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=embed, logits=logits)
model = make_model(family, decoder)
