"""Config of supervised fine-tuning: with no option at all, a small Llama that writes the functions of Python's library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from attrs import evolve, field, frozen

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.config import (
    AnswersSection,
    CommonSection,
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
from fnrecipe.data import Format
from fnrecipe.data.examples import KEYS
from fnrecipe.data.formats.python_functions import PYTHON_FUNCTIONS
from fnrecipe.data.formats.whole_records import whole_records
from fnrecipe.errors import Problem
from fnrecipe.models.llama.config import ARCHS
from fnrecipe.models.needs import model_needs


@frozen
class ExamplesSection(AnswersSection):
    """What other recipes know of data, and what is done with examples.

    `train_on`: all answers of a chat, or the last one. `too_long`: what becomes of an example that is longer than a row.
    """

    train_on: Literal["all", "last"] = "all"
    too_long: Literal["drop", "cut", "error"] = "drop"

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.packing != "best_fit":
            yield Problem("packing", "best_fit, which keeps examples whole", self.packing)
        if self.cache is not None:
            yield Problem("cache", "null: the cache keeps no masks", repr(self.cache))


@frozen
class SFTConfig:
    """`FORMATS`: what sources may be in; a config class of one's own may have others."""

    FORMATS: ClassVar[Mapping[str, Format]] = {**whole_records(KEYS), "python": PYTHON_FUNCTIONS}

    model: ModelSection = field(factory=ModelSection)
    dataset: ExamplesSection = field(factory=ExamplesSection)
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


def needs(config: SFTConfig, ranks: int) -> list[Need]:
    """The least memory of one of `ranks` processes."""
    model = model_needs(config.model, config.optimizer, config.dataset, config.gang, config.trainer, ranks)
    return [*model, *stream_needs(config.dataset, ranks)]


config = SFTConfig(
    model=ModelSection(config=evolve(ARCHS["llama_tiny"], max_seq_len=512)),
    dataset=ExamplesSection(max_seq_len=512, pack_window=64),
    optimizer=OptimizerSection(config=AdamWConfig(lr=1.5e-3)),
    lr_scheduler=LRSchedulerSection(config=CosineAnnealingConfig(num_warmup_steps=0.067)),
    regime=RegimeSection(
        num_steps=300,
        checkpoint_every_n_steps=100,
        validate_every_n_steps=100,
        sample_prompt='def get_name(self):\n    """Return the name."""\n',
    ),
)
