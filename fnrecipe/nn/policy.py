"""How a model is computed: what is kept, and in which dtype. It changes memory, speed and rounding, not what is computed."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
import torch

Remat: TypeAlias = Literal["off", "selective", "layerwise"]


@attrs.frozen
class Policy:
    """
    dtype            of activations, that of the parameters if None; norms and the loss are taken in float32 at least
    remat            what is computed again for the gradient: nothing; what lies between matrix products and attention; layers
    every_nth_layer  which layers are computed again by `layerwise`
    logits_at_once   positions whose logits may be there at once; None: all
    """

    dtype: torch.dtype | None = None
    remat: Remat = "off"
    every_nth_layer: int = 1
    logits_at_once: int | None = None
