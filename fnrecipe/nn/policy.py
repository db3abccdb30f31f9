"""The policy by which a model is computed: dtype and rematerialisation. It changes memory, speed and rounding, nothing else."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
import torch

Chunk: TypeAlias = int | Literal["auto"] | None
Remat: TypeAlias = Literal["off", "selective", "layerwise"]


@attrs.frozen
class Policy:
    """
    dtype            of activations; None: that of the parameters. Norms and the loss are computed in float32 at least
    remat            what is recomputed in the backward pass: nothing; all but matrix products and attention; layers
    every_nth_layer  which layers are recomputed under `layerwise`
    logits_at_once   positions whose logits may be allocated at once; None: all; auto: as the device makes best use of
    max_documents    documents in a row at most, which rows must keep to; None: as many as it has positions
    """

    dtype: torch.dtype | None = None
    remat: Remat = "off"
    every_nth_layer: int = 1
    logits_at_once: Chunk = None
    max_documents: int | None = None
