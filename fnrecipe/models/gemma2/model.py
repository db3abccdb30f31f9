"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and behind each branch, bounded scores and logits, GELUs.

Norms multiply by one more than their weights; embeddings are multiplied by the root of the model's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, DecoderConfig, Heads, Kind, Piece, make_model
from fnrecipe.models.gemma2.config import Gemma2Config, family, parameters
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.rope import Rope
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def kind(config: Gemma2Config, number: int) -> Kind:
    window = config.sliding_window if (number + 1) % config.sliding_window_pattern else None
    scale = config.query_pre_attn_scalar**-0.5
    return Kind(window, Rope(config.rope_theta, config.rope_scaling), scale, config.attn_logit_softcapping)


def embed(config: LlamaConfig, outer: Tree, x: Tensor, positions: Tensor) -> Tensor:
    """The root is rounded to the dtype of activations, as it was when Gemma was trained."""
    return x * torch.full((), math.sqrt(config.model_dim), dtype=x.dtype, device=x.device)


def heads(config: Gemma2Config, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    found: Heads = piece(normed_heads, "attention_norm", "query", "key", "value")(x, angles)
    return found


def rest(config: LlamaConfig, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
    x = piece.attended(attention_normed, "attention_post_norm")(x, piece(pieces.mixed_down, "output")(mixed))
    return feed_forward(piece, x)


def normed(config: DecoderConfig, weight: nn.Weight, x: Tensor) -> Tensor:
    return nn.rms_norm(x, weight, config.norm_eps, offset=1.0)


def normed_heads(config: DecoderConfig, weights: Tree, x: Tensor, angles: Angles) -> Heads:
    """Query, key and value heads of the normalised x, rotated."""
    x = nn.entered(normed(config, weights["attention_norm"], x), weights["query"])
    query, key, value = (pieces.split(config, projected) for projected in pieces.project(weights, x))
    return pieces.rotated(query, angles), pieces.rotated(key, angles), value


def attention_normed(config: DecoderConfig, weights: Tree, written: Tensor) -> Tensor:
    return normed(config, weights["attention_post_norm"], written)


def feed_forward(piece: Piece, x: Tensor) -> Tensor:
    written = piece(down, "down")(*piece(gated, "ffn_norm", "gate", "up")(x))
    return piece.fed(ffn_normed, "ffn_post_norm")(x, written)


def gated(config: DecoderConfig, weights: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    return pieces.gate_and_up(config, weights, normed(config, weights["ffn_norm"], x))


def down(config: DecoderConfig, weights: Tree, gates: Tensor, values: Tensor) -> Tensor:
    return nn.linear(nn.geglu(gates, values), weights["down"])


def ffn_normed(config: DecoderConfig, weights: Tree, written: Tensor) -> Tensor:
    return normed(config, weights["ffn_post_norm"], written)


def logits(config: Gemma2Config, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    head = outer.get("head", outer["embedding"])
    return nn.logits(normed(config, outer["norm"], x), head, chunk, config.final_logit_softcapping)


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, embed=embed, logits=logits)
model = make_model(family, decoder)
