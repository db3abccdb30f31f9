"""Losses: `loss(params, batch, key) -> (sum to be differentiated, sums)`. Sums and counts, never means.

`sums` are 0-d tensors that add up over microbatches, ranks and steps; means are taken once, over all of them, by the
count `targets`. `bytes` is there if the loss can be given in bits per byte of text, and `tokens` if the speed shall be told by
another count than `targets`. `mean/NAME` is shown as the mean NAME, over the count `targets/NAME` or, without it, `targets`.

All that is random in a loss comes from `key`, int64 [2] (`fnrecipe.random`): another one for each microbatch of each step, and
the same one whatever the number of ranks. In an evaluation it is None: nothing is random, nothing is dropped out, and `loss`
is what is measured, whatever is minimised beside it in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from fnrecipe.tree import Tree

Sums: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Tree, Tree, Tensor | None], tuple[Tensor, Sums]]
