"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases, and a feed-forward layer of GELUs.

embedding [V, D]    layers.<i>.{attention_norm, query, key, value, output, ffn_norm, up, down}, and each with `_bias`
positions [T, D]    norm, norm_bias [D]    head [V, D], unless embeddings are tied
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Heads, Kind, Piece, make_model
from fnrecipe.models.gpt2.config import GPT2Config, family, parameters
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def kind(config: GPT2Config, number: int) -> Kind:
    return Kind()


def embed(config: GPT2Config, outer: Tree, x: Tensor, positions: Tensor) -> Tensor:
    return x + nn.embedding(positions, outer["positions"]).to(x.dtype)


def heads(config: GPT2Config, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    found: Heads = piece(projected, *both("attention_norm", "query", "key", "value"))(x)
    return found


def rest(config: GPT2Config, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
    x = piece.attended(output, *both("output"))(x, mixed)
    return piece.fed(down, *both("down"))(x, piece(up, *both("ffn_norm", "up"))(x))


def both(*names: str) -> list[str]:
    """The names of weights and of their biases."""
    return [full for name in names for full in (name, f"{name}_bias")]


def normed(config: GPT2Config, weights: Tree, name: str, x: Tensor) -> Tensor:
    return nn.layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)


def projected(config: GPT2Config, weights: Tree, x: Tensor) -> tuple[Tensor, ...]:
    x = nn.entered(normed(config, weights, "attention_norm", x), weights["query"])
    return tuple(pieces.split(config, product) for product in pieces.project(weights, x))


def output(config: GPT2Config, weights: Tree, mixed: Tensor) -> Tensor:
    return nn.linear(pieces.joined(mixed), weights["output"], weights["output_bias"])


def up(config: GPT2Config, weights: Tree, x: Tensor) -> Tensor:
    x = nn.entered(normed(config, weights, "ffn_norm", x), weights["up"])
    return nn.linear(x, weights["up"], weights["up_bias"])


def down(config: GPT2Config, weights: Tree, inner: Tensor) -> Tensor:
    return nn.linear(F.gelu(inner, approximate="tanh"), weights["down"], weights["down_bias"])


def logits(config: GPT2Config, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    return nn.logits(normed(config, outer, "norm", x), outer.get("head", outer["embedding"]), chunk)


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, embed=embed, logits=logits)
model = make_model(family, decoder)
