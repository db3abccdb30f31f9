"""Losses: `loss(params, batch) -> (sum to be differentiated, sums)`. Sums and counts, never means.

`sums` are 0-d tensors that add up over microbatches, ranks and steps; means are taken once, over all of them, by the
count `targets`. `bytes` is there if the loss can be given in bits per byte of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from fnrecipe.tree import Tree

Sums: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Tree, Any], tuple[Tensor, Sums]]
