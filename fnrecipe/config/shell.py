"""What the shell reads of a recipe's config: the sections that every config has, whatever else is in it."""

from __future__ import annotations

from typing import Protocol

from fnrecipe.config.sections.data import DatasetSection
from fnrecipe.config.sections.run import CommonSection, GangSection, RegimeSection, TrainerSection


class ShellConfig(Protocol):
    """A frozen attrs class with at least these sections."""

    @property
    def gang(self) -> GangSection: ...

    @property
    def trainer(self) -> TrainerSection: ...

    @property
    def dataset(self) -> DatasetSection: ...

    @property
    def regime(self) -> RegimeSection: ...

    @property
    def common(self) -> CommonSection: ...
