"""Llama (Touvron et al. 2023, arXiv:2302.13971): a decoder of RMSNorm, rotary grouped-query attention and SwiGLU.

Parameters are nested dicts; linear weights are [out, in]:

    embedding [V, D]    layers.<i>.{attention_norm, query, key, value, output, ffn_norm, gate, up, down}
    norm [D]            head [V, D], unless embeddings are tied
"""

from __future__ import annotations

from torch import Tensor

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Angles, Decoder, Heads, Kind, Piece, make_model
from fnrecipe.models.llama.config import LlamaConfig, family, parameters
from fnrecipe.models.rope import Rope


def kind(config: LlamaConfig, number: int) -> Kind:
    return Kind(rope=Rope(config.rope_theta, config.rope_scaling))


def heads(config: LlamaConfig, piece: Piece, x: Tensor, angles: Angles) -> Heads:
    found: Heads = piece(pieces.heads, "attention_norm", "query", "key", "value")(x, angles)
    return found


def rest(config: LlamaConfig, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
    return pieces.feed_forward(piece, piece.attended(pieces.mixed_down, "output")(x, mixed))


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, logits=pieces.logits)
model = make_model(family, decoder)
init, apply, flops, rules = model.init, model.apply, model.flops, model.rules
