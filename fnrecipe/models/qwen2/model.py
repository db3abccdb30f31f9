"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671, arXiv:2412.15115): a Llama with biases of queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Heads, Piece, make_model
from fnrecipe.models.llama.model import kind, rest
from fnrecipe.models.qwen2.config import Qwen2Config, family, parameters

WITH_BIASES = ("query", "query_bias", "key", "key_bias", "value", "value_bias")


def heads(config: Qwen2Config, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    found: Heads = piece(pieces.heads, "attention_norm", *WITH_BIASES)(x, angles)
    return found


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, logits=pieces.logits)
model = make_model(family, decoder)
