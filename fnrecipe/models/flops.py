"""FLOPs of a model by convention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs


@attrs.frozen
class TokenFlops:
    """FLOPs that training on one position takes by convention, forward and backward.

    full    with attention as if every position saw the whole row, as most tables give it
    causal  with half of that attention: what a position sees of its row on average
    """

    full: int
    causal: int


def token_flops(weights: Iterable[Sequence[int]], *, layers: int, width: int, length: int) -> TokenFlops:
    """6 * (parameters in products) + 12 * layers * width * length (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    `weights`: shapes of all weights that a position is multiplied by: with a tied embedding as the head, without one that is
    only looked up in; vectors take part in no product and are left out. `width`: heads * head width; `length`: of a row.
    """
    parameters = sum(math.prod(shape) for shape in weights if len(shape) > 1)
    attention = 12 * layers * width * length
    return TokenFlops(6 * parameters + attention, 6 * parameters + attention // 2)
