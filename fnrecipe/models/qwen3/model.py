"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): a Llama with a norm of each query and key head."""

from __future__ import annotations

from torch import Tensor

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Heads, Piece, make_model
from fnrecipe.models.llama.model import kind, rest
from fnrecipe.models.qwen3.config import Qwen3Config, family, parameters


def heads(config: Qwen3Config, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    query, key, value = piece(pieces.heads, "attention_norm", "query", "key", "value")(x, ())
    query, key = piece(pieces.normed_heads, "query_norm", "key_norm")(query, key, angles)
    return query, key, value


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, logits=pieces.logits)
model = make_model(family, decoder)
