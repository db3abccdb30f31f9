"""OLMo 2 (OLMo et al. 2024, arXiv:2501.00656): a Llama with norms behind its branches, and of queries and keys."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Piece, make_model
from fnrecipe.models.llama.model import kind
from fnrecipe.models.olmo2.config import Olmo2Config, family, parameters
from fnrecipe.nn.attention import AttentionMask
from fnrecipe.tree import Tree


def layer(config: Olmo2Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(projected, "query", "key", "value")(x)
    query, key, value = piece(heads, "query_norm", "key_norm")(query, key, value, angles)
    written = piece(pieces.mixed_down, "output")(nn.attention(query, key, value, mask))
    x = piece(attended, "attention_norm")(x, written)
    written = piece(pieces.gated_down, "down")(*piece(pieces.gate_and_up, "gate", "up")(x))
    out: Tensor = piece(fed, "ffn_norm")(x, written)
    return out


def projected(config: Olmo2Config, weights: Tree, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(pieces.project(weights, nn.entered(x, weights["query"])))


def heads(
    config: Olmo2Config, weights: Tree, query: Tensor, key: Tensor, value: Tensor, angles: Angles
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm is over all heads together."""
    query = nn.rms_norm(query, weights["query_norm"], config.norm_eps)
    key = nn.rms_norm(key, weights["key_norm"], config.norm_eps)
    query, key, value = (pieces.split(config, projected) for projected in (query, key, value))
    return pieces.rotated(query, angles), pieces.rotated(key, angles), value


def attended(config: Olmo2Config, weights: Tree, x: Tensor, written: Tensor) -> Tensor:
    return x + nn.rms_norm(written, weights["attention_norm"], config.norm_eps)


def fed(config: Olmo2Config, weights: Tree, x: Tensor, written: Tensor) -> Tensor:
    return x + nn.rms_norm(written, weights["ffn_norm"], config.norm_eps)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=pieces.embed, logits=pieces.logits)
model = make_model(family, decoder)
