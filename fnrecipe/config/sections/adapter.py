"""The adapter of a model: matrices of low rank that are trained in the place of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen
from attrs.converters import optional

from fnrecipe.config.bounds import Positive, PositiveInt, ProperFraction
from fnrecipe.config.paths import expanded
from fnrecipe.config.patterns import tag_conflicts
from fnrecipe.errors import Problem


@frozen
class AdapterSection:
    """`name`: its kind; null: there is none, and the weights themselves are trained.

    `alpha`: the product of the two matrices counts alpha / rank. `targets`: patterns of the paths of adapted weights.
    `dropout`: the probability by which an element of what the two matrices multiply is dropped, in training.
    `path`: a directory of peft that gives the adapter to begin with; null: the product begins as zeros.
    """

    name: Literal["lora", "dora"] | None = None
    path: str | None = field(default=None, converter=optional(expanded))
    rank: PositiveInt = 16
    alpha: Positive = 32.0
    targets: tuple[str, ...] = ("layers.*",)
    dropout: ProperFraction = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def conflicts(self) -> Iterator[Problem]:
        if self.name is None and self != AdapterSection():
            yield Problem("name", "lora or dora beside other keys of the adapter", "null")
        if not self.targets:
            yield Problem("targets", "a pattern of the paths of weights", "[]")
        yield from tag_conflicts("targets", self.targets)
