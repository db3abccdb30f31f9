"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases, and a feed-forward layer of GELUs.

embedding [V, D]    layers.<i>.{attention_norm, query, key, value, output, ffn_norm, up, down}, and each with `_bias`
positions [T, D]    norm, norm_bias [D]    head [V, D], unless embeddings are tied
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Kind, Piece, make_model
from fnrecipe.models.gpt2.config import GPT2Config, family, parameters
from fnrecipe.nn.attention import AttentionMask
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def kind(config: GPT2Config, number: int) -> Kind:
    return Kind()


def embed(config: GPT2Config, outer: Tree, tokens: Tensor, positions: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = pieces.embed(config, outer, tokens, positions, dtype)
    return x + nn.embedding(positions, outer["positions"]).to(x.dtype)


def layer(config: GPT2Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(heads, *both("attention_norm", "query", "key", "value"))(x)
    x = piece(output, *both("output"))(x, nn.attention(query, key, value, mask))
    written: Tensor = piece(down, *both("down"))(x, piece(up, *both("ffn_norm", "up"))(x))
    return written


def both(*names: str) -> list[str]:
    """The names of weights and of their biases."""
    return [full for name in names for full in (name, f"{name}_bias")]


def normed(config: GPT2Config, weights: Tree, name: str, x: Tensor) -> Tensor:
    return nn.layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)


def heads(config: GPT2Config, weights: Tree, x: Tensor) -> tuple[Tensor, ...]:
    x = nn.entered(normed(config, weights, "attention_norm", x), weights["query"])
    return tuple(pieces.split(config, projected) for projected in pieces.project(weights, x))


def output(config: GPT2Config, weights: Tree, x: Tensor, mixed: Tensor) -> Tensor:
    return x + nn.linear(pieces.joined(mixed), weights["output"], weights["output_bias"])


def up(config: GPT2Config, weights: Tree, x: Tensor) -> Tensor:
    x = nn.entered(normed(config, weights, "ffn_norm", x), weights["up"])
    return nn.linear(x, weights["up"], weights["up_bias"])


def down(config: GPT2Config, weights: Tree, x: Tensor, inner: Tensor) -> Tensor:
    return x + nn.linear(F.gelu(inner, approximate="tanh"), weights["down"], weights["down_bias"])


def logits(config: GPT2Config, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    return nn.logits(normed(config, outer, "norm", x), outer.get("head", outer["embedding"]), chunk)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=embed, logits=logits)
model = make_model(family, decoder)
