"""OLMo 3 (Team OLMo 2025, arXiv:2512.13961): OLMo 2 with sliding windows in three of four layers."""

from __future__ import annotations

from fnrecipe.models import pieces
from fnrecipe.models.decoder import Decoder, Kind, make_model
from fnrecipe.models.olmo2.config import parameters
from fnrecipe.models.olmo2.model import heads, rest
from fnrecipe.models.olmo3.config import Olmo3Config, family
from fnrecipe.models.rope import Rope


def kind(config: Olmo3Config, number: int) -> Kind:
    if (number + 1) % config.sliding_window_pattern:
        return Kind(config.sliding_window, Rope(config.rope_theta))
    return Kind(rope=Rope(config.rope_theta, config.rope_scaling))


decoder = Decoder(table=parameters, kind=kind, heads=heads, rest=rest, logits=pieces.logits)
model = make_model(family, decoder)
