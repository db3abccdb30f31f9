"""SmolLM 3 (Bakouch et al. 2025): a Llama without positions in every fourth layer (Yang et al. 2025, arXiv:2501.18795)."""

from __future__ import annotations

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Decoder, Kind, make_model
from fnrecipe.models.llama import model as llama
from fnrecipe.models.llama.config import parameters
from fnrecipe.models.smollm3.config import SmolLM3Config, family


def kind(config: SmolLM3Config, number: int) -> Kind:
    return llama.kind(config, number) if (number + 1) % config.no_rope_layer_interval else Kind()


decoder = Decoder(table=parameters, kind=kind, heads=llama.heads, rest=llama.rest, logits=pieces.logits)
model = make_model(family, decoder)
