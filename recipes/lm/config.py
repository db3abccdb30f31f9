"""Config of the language-model recipe: with no option at all, a small Llama on the sources of Python's own library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from attrs import field, frozen

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.config import (
    CommonSection,
    DatasetSection,
    EvaluationSection,
    GangSection,
    LossSection,
    LRSchedulerSection,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TokenizerSection,
    TrainerSection,
    evaluation_conflicts,
)
from fnrecipe.config.affects import RUNTIME
from fnrecipe.config.conflicts import decoder_conflicts
from fnrecipe.config.needs import Need, stream_needs
from fnrecipe.data import FORMATS, Format
from fnrecipe.errors import Problem
from fnrecipe.models.llama.config import ARCHS
from fnrecipe.models.needs import model_needs


@frozen
class LMConfig:
    """`FORMATS`: what sources may be in; a config class of one's own may have others."""

    FORMATS: ClassVar[Mapping[str, Format]] = FORMATS

    model: ModelSection = field(factory=ModelSection)
    dataset: DatasetSection = field(factory=DatasetSection)
    tokenizer: TokenizerSection = field(factory=TokenizerSection)
    gang: GangSection = field(factory=GangSection)
    trainer: TrainerSection = field(factory=TrainerSection)
    loss: LossSection = field(factory=LossSection)
    optimizer: OptimizerSection = field(factory=OptimizerSection)
    lr_scheduler: LRSchedulerSection = field(factory=LRSchedulerSection)
    regime: RegimeSection = field(factory=RegimeSection)
    evaluations: tuple[EvaluationSection, ...] = field(default=(), metadata=RUNTIME)
    common: CommonSection = field(factory=CommonSection)

    def conflicts(self) -> Iterator[Problem]:
        yield from decoder_conflicts(self)
        yield from evaluation_conflicts(self.evaluations, self.FORMATS)


def needs(config: LMConfig, ranks: int) -> list[Need]:
    """The least memory of one of `ranks` processes."""
    model = model_needs(config.model, config.optimizer, config.dataset, config.gang, config.trainer, ranks)
    return [*model, *stream_needs(config.dataset, ranks)]


config = LMConfig(
    model=ModelSection(config=ARCHS["llama_tiny"]),
    dataset=DatasetSection(max_seq_len=256, pack_window=64),
    optimizer=OptimizerSection(config=AdamWConfig(lr=1.5e-3)),
    lr_scheduler=LRSchedulerSection(config=CosineAnnealingConfig(num_warmup_steps=0.067)),
    regime=RegimeSection(
        num_steps=600,
        checkpoint_every_n_steps=100,
        validate_every_n_steps=100,
        sample_prompt="def __init__(self, name):\n        self.",
    ),
)
