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


def token_flops(weights: Iterable[Sequence[int]], *, windows: Sequence[int], width: int, length: int) -> TokenFlops:
    """6 * (parameters in products) + 12 * width * (positions seen in all layers) (Chowdhery et al. 2022, arXiv:2204.02311, B).

    weights  shapes of all that a position is multiplied by: with a tied embedding as the head, without one that is only looked
             up in; vectors take part in no product and are left out
    windows  for each layer the positions that it attends to at most; what is longer than the row sees all of it
    width    heads * head width
    length   of a row
    """
    products = 6 * sum(math.prod(shape) for shape in weights if len(shape) > 1)
    seen = [min(window, length) for window in windows]
    # A row's positions see 1, 2, …, w, w, …, w positions: on average w - w²/2T, half of T where there is no window.
    causal = sum(6 * width * window * (2 * length - window) // length for window in seen)
    return TokenFlops(products + 12 * width * sum(seen), products + causal)
