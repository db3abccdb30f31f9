"""Noise of training: dropout of the residual stream, and the noise of embeddings of NEFTune.

Numbers come from a key and the number of a position alone, whatever other positions a rank has: so a layer that is computed
again, or on several ranks, has the same ones.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import random


@attrs.frozen
class Noise:
    """
    dropout  probability by which an element of the embeddings, and of what a sublayer adds to the residual stream, is dropped
    neftune  alpha: noise of embeddings is uniform up to alpha / √(positions of the document · D); 0: none
    """

    dropout: float = 0.0
    neftune: float = 0.0


def position_numbers(tokens: Tensor) -> Tensor:
    """A number for each position of tokens [B, T]: int64 [B, T]."""
    return torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)


def dropout(x: Tensor, rate: float, key: Tensor, numbers: Tensor, columns: tuple[int, int] = (0, 1)) -> Tensor:
    """x [B, T, D] with each element 0 with the probability `rate` < 1, in whole 65536ths, and the others over the rest's.

    numbers int64 [B, T]: those of the positions (`position_numbers`). columns: (i, n) if x is the i-th of n equal parts of
    what has all elements.
    """
    dropped, (index, parts) = int(rate * 2**16), columns
    kept = random.halfwords(key, numbers, parts * x.shape[-1]).chunk(parts, -1)[index] >= dropped
    return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0)


def embedding_noise(x: Tensor, alpha: float, key: Tensor, numbers: Tensor, lengths: Tensor) -> Tensor:
    """Embeddings x [B, T, D] plus uniform noise up to alpha / √(L·D) (NEFTune: Jain et al. 2023, arXiv:2310.05914).

    lengths int64 [B, T]: L, the positions of the document that each is of. numbers: as in `dropout`.
    """
    uniform = (random.halfwords(key, numbers, x.shape[-1]) + 0.5) * 2.0**-15 - 1
    return x + (uniform * (alpha / torch.sqrt(lengths * x.shape[-1])[..., None])).to(x.dtype)
