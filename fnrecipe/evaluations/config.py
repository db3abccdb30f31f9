"""What evaluations read of a recipe's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fnrecipe.config import EvaluationSection, ModelSection, ShellConfig, TokenizerSection


class TextConfig(ShellConfig, Protocol):
    """The config of a recipe of text."""

    @property
    def model(self) -> ModelSection: ...

    @property
    def tokenizer(self) -> TokenizerSection: ...


class NamingConfig(TextConfig, Protocol):
    """One that names evaluations."""

    @property
    def evaluations(self) -> Sequence[EvaluationSection]: ...
