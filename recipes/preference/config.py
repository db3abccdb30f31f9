"""Config of preference optimization: with no option at all, a small Llama that prefers functions to those written backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from attrs import evolve, field, frozen
from attrs.converters import optional

from fnrecipe.components.lr_schedulers.cosine_annealing import CosineAnnealingConfig
from fnrecipe.components.optimizers.adamw import AdamWConfig
from fnrecipe.config import (
    AnswersSection,
    CommonSection,
    CriterionSection,
    EvaluationSection,
    GangSection,
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
from fnrecipe.config.find import find_component
from fnrecipe.config.needs import Need, stream_needs
from fnrecipe.config.paths import expanded
from fnrecipe.config.sections.optim import CRITERIA
from fnrecipe.data import Format
from fnrecipe.data.formats.python_functions import PYTHON_PREFERENCES
from fnrecipe.data.formats.whole_records import whole_records
from fnrecipe.data.preferences import KEYS
from fnrecipe.errors import Problem
from fnrecipe.models.llama.config import ARCHS
from fnrecipe.models.needs import model_needs, reference_needs


@frozen
class PreferencesSection(AnswersSection):
    """What other recipes know of data, and what is done with preferences.

    `too_long`: what becomes of a pair that is longer than a row.
    """

    too_long: Literal["drop", "error"] = "drop"

    def conflicts(self) -> Iterator[Problem]:
        yield from super().conflicts()
        if self.packing != "best_fit":
            yield Problem("packing", "best_fit, which keeps pairs whole", self.packing)
        if self.attention != "document":
            yield Problem("attention", "document, or the two answers of a pair would see each other", self.attention)
        if self.documents_per_row < 2:
            yield Problem("max_documents_per_row", "at least 2, the answers of a pair", str(self.documents_per_row))
        if self.cache is not None:
            yield Problem("cache", "null: the cache keeps no verdicts", repr(self.cache))


@frozen
class ReferenceSection:
    """The frozen model that a criterion compares with, of the family and shape of `model`.

    `path`: a directory that gives its weights; null: those that the run begins with. `dtype`: in which they are kept.
    `precomputed`: there is no model, but the records have its log-probabilities.
    """

    path: str | None = field(default=None, converter=optional(expanded))
    dtype: Literal["float32", "bfloat16"] = "float32"
    precomputed: bool = False


@frozen
class PreferenceConfig:
    """`FORMATS`: what sources may be in; a config class of one's own may have others."""

    FORMATS: ClassVar[Mapping[str, Format]] = {**whole_records(KEYS), "python": PYTHON_PREFERENCES}

    model: ModelSection = field(factory=ModelSection)
    reference: ReferenceSection = field(factory=ReferenceSection)
    criterion: CriterionSection = field(factory=CriterionSection)
    dataset: PreferencesSection = field(factory=PreferencesSection)
    tokenizer: TokenizerSection = field(factory=TokenizerSection)
    gang: GangSection = field(factory=GangSection)
    trainer: TrainerSection = field(factory=TrainerSection)
    optimizer: OptimizerSection = field(factory=OptimizerSection)
    lr_scheduler: LRSchedulerSection = field(factory=LRSchedulerSection)
    regime: RegimeSection = field(factory=RegimeSection)
    evaluations: tuple[EvaluationSection, ...] = field(default=(), metadata=RUNTIME)
    common: CommonSection = field(factory=CommonSection)

    @property
    def has_reference(self) -> bool:
        """Whether the model is compared with a reference model."""
        return find_component(self.criterion.name, CRITERIA).reference and not self.reference.precomputed

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference model has parameters of its own: beside an adapter, the base is that model."""
        return self.has_reference and (self.model.adapter.name is None or self.reference.path is not None)

    @property
    def in_pairs(self) -> bool:
        return find_component(self.criterion.name, CRITERIA).pairs

    def conflicts(self) -> Iterator[Problem]:
        yield from decoder_conflicts(self)
        yield from evaluation_conflicts(self.evaluations, self.FORMATS)
        name, given = self.criterion.name, self.reference
        if given != ReferenceSection() and not find_component(name, CRITERIA).reference:
            yield Problem("reference", f"nothing for criterion.name={name}, which has no reference model", str(given))
        if given.precomputed and not self.in_pairs:
            yield Problem("reference.precomputed", f"false for criterion.name={name}, which is not of pairs", "true")
        if given.precomputed and given.path is not None:
            yield Problem("reference.path", "null for reference.precomputed=true", repr(given.path))
        if self.has_reference and not self.keeps_reference and given.dtype != ReferenceSection().dtype:
            expected = "float32 beside model.adapter: the reference model is the base, in model.dtype"
            yield Problem("reference.dtype", expected, repr(given.dtype))


def needs(config: PreferenceConfig, ranks: int) -> list[Need]:
    """The least memory of one of `ranks` processes."""
    model = model_needs(config.model, config.optimizer, config.dataset, config.gang, config.trainer, ranks)
    frozen = reference_needs(config.model, config.reference.dtype, config.gang, ranks) if config.keeps_reference else []
    return [*model, *frozen, *stream_needs(config.dataset, ranks)]


config = PreferenceConfig(
    model=ModelSection(config=evolve(ARCHS["llama_tiny"], max_seq_len=512)),
    dataset=PreferencesSection(max_seq_len=512, pack_window=64),
    optimizer=OptimizerSection(config=AdamWConfig(lr=2e-4)),
    lr_scheduler=LRSchedulerSection(config=CosineAnnealingConfig(num_warmup_steps=0.067)),
    regime=RegimeSection(
        num_steps=100,
        checkpoint_every_n_steps=50,
        validate_every_n_steps=50,
        sample_prompt='def get_name(self):\n    """Return the name."""\n',
    ),
)
