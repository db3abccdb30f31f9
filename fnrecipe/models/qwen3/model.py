"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): a Llama with a norm of each query and key head."""

from __future__ import annotations

from torch import Tensor

from fnrecipe import nn
from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Piece, make_model
from fnrecipe.models.llama.model import kind
from fnrecipe.models.qwen3.config import Qwen3Config, family, parameters
from fnrecipe.nn.attention import AttentionMask


def layer(config: Qwen3Config, piece: Piece, x: Tensor, angles: Angles, mask: AttentionMask) -> Tensor:
    query, key, value = piece(pieces.heads, "attention_norm", "query", "key", "value")(x, ())
    query, key = piece(pieces.normed_heads, "query_norm", "key_norm")(query, key, angles)
    x = piece(pieces.output, "output")(x, nn.attention(query, key, value, mask))
    return pieces.feed_forward(piece, x)


decoder = Decoder(table=parameters, kind=kind, layer=layer, embed=pieces.embed, logits=pieces.logits)
model = make_model(family, decoder)
