"""OLMo 2 (OLMo et al. 2024, arXiv:2501.00656): a Llama with norms behind its branches, and of queries and keys."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Heads, Piece, make_model
from fnrecipe.models.llama.model import kind
from fnrecipe.models.olmo2.config import Olmo2Config, family, parameters
from fnrecipe.tree import Tree


def heads(config: Olmo2Config, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    query, key, value = piece(projected, "query", "key", "value")(x)
    found: Heads = piece(normed_heads, "query_norm", "key_norm")(query, key, value, angles)
    return found


def rest(config: Olmo2Config, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
    x = piece.attended(attention_normed, "attention_norm")(x, piece(pieces.mixed_down, "output")(mixed))
    written = piece(pieces.gated_down, "down")(*piece(pieces.gate_and_up, "gate", "up")(x))
    return piece.fed(ffn_normed, "ffn_norm")(x, written)


def projected(config: Olmo2Config, weights: Tree, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(pieces.project(weights, nn.entered(x, weights["query"])))


def normed_heads(config: Olmo2Config, weights: Tree, query: Tensor, key: Tensor, value: Tensor, angles: Angles) -> Heads:
    """The norm is over all heads together."""
    query = nn.rms_norm(query, weights["query_norm"], config.norm_eps)
    key = nn.rms_norm(key, weights["key_norm"], config.norm_eps)
    query, key, value = (pieces.split(config, projected) for projected in (query, key, value))
    return pieces.rotated(query, angles), pieces.rotated(key, angles), value


def attention_normed(config: Olmo2Config, weights: Tree, written: Tensor) -> Tensor:
    return nn.rms_norm(written, weights["attention_norm"], config.norm_eps)


def ffn_normed(config: Olmo2Config, weights: Tree, written: Tensor) -> Tensor:
    return nn.rms_norm(written, weights["ffn_norm"], config.norm_eps)


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, logits=pieces.logits)
model = make_model(family, decoder)
