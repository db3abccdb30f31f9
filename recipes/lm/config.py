"""Config of the language-model recipe: with no option at all, a small Llama on the sources of Python's own library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from attrs import evolve, field, frozen

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.config import (
    CommonSection,
    DatasetSection,
    GangSection,
    LRSchedulerSection,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TokenizerSection,
    TrainerSection,
)
from fnrecipe.config.affects import cut_sizes
from fnrecipe.config.needs import Need, stream_needs
from fnrecipe.data import FORMATS, Format
from fnrecipe.errors import Problem, did_you_mean
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
    optimizer: OptimizerSection = field(factory=OptimizerSection)
    lr_scheduler: LRSchedulerSection = field(factory=LRSchedulerSection)
    regime: RegimeSection = field(factory=RegimeSection)
    common: CommonSection = field(factory=CommonSection)

    def conflicts(self) -> Iterator[Problem]:
        context, rows, microbatches = self.model.config.max_seq_len, self.dataset.batch_size, self.gang.num_microbatches
        if self.dataset.max_seq_len > context:
            expected = f"at most model.config.max_seq_len = {context}"
            yield Problem("dataset.max_seq_len", expected, str(self.dataset.max_seq_len))
        if rows % microbatches:
            yield Problem("dataset.batch_size", f"a multiple of gang.num_microbatches = {microbatches}", str(rows))
        if self.gang.sharding in ("zero2", "fsdp") and self.dataset.num_lanes % microbatches:
            expected = f"a multiple of gang.num_microbatches = {microbatches} for gang.sharding={self.gang.sharding}"
            yield Problem("dataset.num_lanes", expected, str(self.dataset.num_lanes))
        if self.model.dtype == "bfloat16" and self.trainer.dtype == "float16":
            yield Problem("trainer.dtype", "float32 or bfloat16 for model.dtype=bfloat16", "'float16'")
        yield from self._tensor_parallel_conflicts()
        yield from self._format_conflicts()
        for problem in self.lr_scheduler.conflicts_over(self.regime.num_steps):
            yield evolve(problem, path=f"lr_scheduler.{problem.path}")

    def _tensor_parallel_conflicts(self) -> Iterator[Problem]:
        ranks = self.gang.tensor_parallel_size
        sizes = {f"model.config.{name}": size for name, size in cut_sizes(self.model.config).items()}
        for path, size in {**sizes, "dataset.max_seq_len": self.dataset.max_seq_len}.items():
            if size % ranks:
                yield Problem(path, f"a multiple of gang.tensor_parallel_size = {ranks}", str(size))

    def _format_conflicts(self) -> Iterator[Problem]:
        known = ("auto", *self.FORMATS)
        for key in ("sources", "valid_sources"):
            for number, source in enumerate(getattr(self.dataset, key)):
                if source.format not in known:
                    path, near = f"dataset.{key}[{number}].format", did_you_mean(source.format, known)
                    hint = near if near.startswith("did") else ""
                    yield Problem(path, " or ".join(known), repr(source.format), hint=hint)


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
