"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671, arXiv:2412.15115): a Llama with biases of queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Piece, make_model
from fnrecipe.models.llama.model import kind
from fnrecipe.models.qwen2.config import Qwen2Config, family, parameters
from fnrecipe.nn.attention import AttentionMask

WITH_BIASES = ("query", "query_bias", "key", "key_bias", "value", "value_bias")


def layer(config: Qwen2Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(pieces.heads, "attention_norm", *WITH_BIASES)(x, angles)
    x = piece(pieces.output, "output")(x, nn.attention(query, key, value, mask))
    return pieces.feed_forward(piece, x)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=pieces.embed, logits=pieces.logits)
model = make_model(family, decoder)
