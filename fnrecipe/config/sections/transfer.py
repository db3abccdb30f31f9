"""Which model the rates were found for: rules by which they hold for one that is wider or deeper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import frozen

from fnrecipe.config.bounds import PositiveInt
from fnrecipe.errors import Problem


@frozen
class TransferSection:
    """`name`: the rules; null: none. `base_width`, `base_depth`: `model_dim` and `num_layers` of the model they start from.

    `base_head_dim`: the width of a head there; null: that of the model, which then differs in the number of heads.
    """

    name: Literal["mup", "completep"] | None = None
    base_width: PositiveInt | None = None
    base_depth: PositiveInt | None = None
    base_head_dim: PositiveInt | None = None

    def conflicts(self) -> Iterator[Problem]:
        if self.name is None:
            if self != TransferSection():
                yield Problem("name", "mup or completep beside other keys of the transfer", "null")
            return
        if self.base_width is None:
            yield Problem("base_width", f"the model_dim for which the rates were found, for {self.name}", "null")
        if self.name == "completep" and self.base_depth is None:
            yield Problem("base_depth", "the num_layers for which the rates were found, for completep", "null")
        if self.name == "mup" and self.base_depth is not None:
            yield Problem("base_depth", "null for mup, which has rules of width alone", str(self.base_depth))
