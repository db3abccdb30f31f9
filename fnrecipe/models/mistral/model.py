"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama with sliding windows."""

from __future__ import annotations

import attrs

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Decoder, Kind, make_model
from fnrecipe.models.llama import model as llama
from fnrecipe.models.llama.config import parameters
from fnrecipe.models.mistral.config import MistralConfig, family


def kind(config: MistralConfig, number: int) -> Kind:
    return attrs.evolve(llama.kind(config, number), window=config.sliding_window)


decoder = Decoder(table=parameters, kind=kind, heads=llama.heads, rest=llama.rest, logits=pieces.logits)
model = make_model(family, decoder)
