"""Pieces of layers, and the ends of a decoder, from which families make theirs; each is a function that can be read alone.

A weight with a bias has it beside it under its name and `_bias`. B rows, T positions, E width of a head.
"""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models.decoder import Angles, DecoderConfig, Piece
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def logits(config: DecoderConfig, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    x = nn.rms_norm(x, outer["norm"], config.norm_eps)
    return nn.logits(x, outer.get("head", outer["embedding"]), chunk)


def project(weights: Tree, x: Tensor) -> list[Tensor]:
    """Query, key and value of x, each of them [B, T, heads * E]."""
    return [nn.linear(x, weights[name], weights.get(f"{name}_bias")) for name in ("query", "key", "value")]


def split(config: DecoderConfig, x: Tensor) -> Tensor:
    """[B, T, heads * E] as [B, heads, T, E]."""
    return x.view(*x.shape[:-1], -1, config.head_width).transpose(1, 2)


def joined(mixed: Tensor) -> Tensor:
    """[B, heads, T, E] as [B, T, heads * E]."""
    return mixed.transpose(1, 2).flatten(-2)


def rotated(x: Tensor, angles: Angles) -> Tensor:
    return nn.rotate(x, *angles) if angles else x


def heads(config: DecoderConfig, weights: Tree, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads of the normalised x, rotated."""
    x = nn.entered(nn.rms_norm(x, weights["attention_norm"], config.norm_eps), weights["query"])
    query, key, value = (split(config, projected) for projected in project(weights, x))
    return rotated(query, angles), rotated(key, angles), value


def mixed_down(config: DecoderConfig, weights: Tree, mixed: Tensor) -> Tensor:
    return nn.linear(joined(mixed), weights["output"])


def normed_heads(config: DecoderConfig, weights: Tree, query: Tensor, key: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """Query and key heads, each normalised by itself, then rotated."""
    query = nn.rms_norm(query, weights["query_norm"], config.norm_eps)
    key = nn.rms_norm(key, weights["key_norm"], config.norm_eps)
    return rotated(query, angles), rotated(key, angles)


def gated(config: DecoderConfig, weights: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two products with the normalised x in a gated feed-forward unit."""
    return gate_and_up(config, weights, nn.rms_norm(x, weights["ffn_norm"], config.norm_eps))


def gate_and_up(config: DecoderConfig, weights: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    x = nn.entered(x, weights["gate"])
    return nn.linear(x, weights["gate"]), nn.linear(x, weights["up"])


def gated_down(config: DecoderConfig, weights: Tree, gates: Tensor, values: Tensor) -> Tensor:
    return nn.linear(nn.swiglu(gates, values), weights["down"])


def feed_forward(piece: Piece, x: Tensor) -> Tensor:
    """SwiGLU behind a norm."""
    return piece.fed(gated_down, "down")(x, *piece(gated, "ffn_norm", "gate", "up")(x))
