"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), the decoder of text: Gemma 2 with norms of heads, and two rotary bases."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Kind, Piece, make_model
from fnrecipe.models.gemma2 import model as gemma2
from fnrecipe.models.gemma3.config import Gemma3Config, family, parameters
from fnrecipe.models.rope import Rope
from fnrecipe.nn.attention import AttentionMask
from fnrecipe.nn.policy import Chunk
from fnrecipe.tree import Tree


def kind(config: Gemma3Config, number: int) -> Kind:
    if (number + 1) % config.sliding_window_pattern:
        return Kind(config.sliding_window, Rope(config.rope_local_theta))
    return Kind(rope=Rope(config.rope_theta, config.rope_scaling))


def layer(config: Gemma3Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(gemma2.heads, "attention_norm", "query", "key", "value")(x, ())
    query, key = piece(normed_heads, "query_norm", "key_norm")(query, key, angles)
    mixed = nn.attention(query, key, value, mask, config.query_pre_attn_scalar**-0.5)
    x = piece(gemma2.attended, "attention_post_norm")(x, piece(pieces.mixed_down, "output")(mixed))
    return gemma2.feed_forward(piece, x)


def normed_heads(config: Gemma3Config, weights: Tree, query: Tensor, key: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    query, key = gemma2.normed(config, weights["query_norm"], query), gemma2.normed(config, weights["key_norm"], key)
    return pieces.rotated(query, angles), pieces.rotated(key, angles)


def logits(config: Gemma3Config, outer: Tree, x: Tensor, chunk: Chunk) -> nn.Logits:
    return nn.logits(gemma2.normed(config, outer["norm"], x), outer.get("head", outer["embedding"]), chunk)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=gemma2.embed, logits=logits)
model = make_model(family, decoder)
