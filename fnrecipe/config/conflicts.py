"""What cannot stand together in the config of a recipe that trains a decoder on packed rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from attrs import evolve, fields_dict

from fnrecipe.config.affects import cut_sizes
from fnrecipe.config.find import find_component, known
from fnrecipe.config.sections import (
    DatasetSection,
    GangSection,
    LRSchedulerSection,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TrainerSection,
)
from fnrecipe.config.sections.optim import OPTIMIZERS
from fnrecipe.errors import Problem, did_you_mean


class DecoderConfig(Protocol):
    """What is read of a recipe's config."""

    @property
    def FORMATS(self) -> Mapping[str, object]: ...  # noqa: N802 a table
    @property
    def model(self) -> ModelSection: ...
    @property
    def dataset(self) -> DatasetSection: ...
    @property
    def gang(self) -> GangSection: ...
    @property
    def trainer(self) -> TrainerSection: ...
    @property
    def optimizer(self) -> OptimizerSection: ...
    @property
    def lr_scheduler(self) -> LRSchedulerSection: ...
    @property
    def regime(self) -> RegimeSection: ...


def decoder_conflicts(config: DecoderConfig) -> Iterator[Problem]:
    """The problems between sections."""
    dataset, gang, microbatches = config.dataset, config.gang, config.gang.num_microbatches
    context, rows = config.model.config.max_seq_len, dataset.batch_size
    if dataset.max_seq_len > context:
        yield Problem("dataset.max_seq_len", f"at most model.config.max_seq_len = {context}", str(dataset.max_seq_len))
    if rows % microbatches:
        yield Problem("dataset.batch_size", f"a multiple of gang.num_microbatches = {microbatches}", str(rows))
    if gang.sharding in ("zero2", "fsdp") and dataset.num_lanes % microbatches:
        expected = f"a multiple of gang.num_microbatches = {microbatches} for gang.sharding={gang.sharding}"
        yield Problem("dataset.num_lanes", expected, str(dataset.num_lanes))
    if config.model.dtype == "bfloat16" and config.trainer.dtype == "float16":
        yield Problem("trainer.dtype", "float32 or bfloat16 for model.dtype=bfloat16", "'float16'")
    if config.model.dtype == config.optimizer.state_dtype == "bfloat16":
        yield Problem("optimizer.state_dtype", "null or 8bit for model.dtype=bfloat16, in which moments are too", "'bfloat16'")
    average, steps = config.trainer.average, config.regime.num_steps
    if average is not None and steps is not None and average.start >= steps:
        yield Problem("trainer.average.start", f"less than regime.num_steps = {steps}", str(average.start))
    for problem in config.regime.batch_size_conflicts(rows, microbatches):
        yield evolve(problem, path=f"regime.{problem.path}")
    yield from _tensor_parallel_conflicts(config)
    yield from _transfer_conflicts(config)
    yield from _format_conflicts(config)
    own = {f"optimizer.{name}": getattr(config.optimizer, name) for name in ("weight_decay_scheduler", "momentum_scheduler")}
    for path, scheduler in {"lr_scheduler": config.lr_scheduler, **own}.items():
        for problem in scheduler.conflicts_over(config.regime.num_steps) if scheduler else ():
            yield evolve(problem, path=f"{path}.{problem.path}")


def _tensor_parallel_conflicts(config: DecoderConfig) -> Iterator[Problem]:
    ranks = config.gang.tensor_parallel_size
    if ranks > 1 and config.optimizer.state_dtype == "8bit":
        yield Problem("optimizer.state_dtype", f"null or bfloat16 for gang.tensor_parallel_size = {ranks}", "'8bit'")
    sizes = {f"model.config.{name}": size for name, size in cut_sizes(config.model.config).items()}
    for path, size in {**sizes, "dataset.max_seq_len": config.dataset.max_seq_len}.items():
        if size % ranks:
            yield Problem(path, f"a multiple of gang.tensor_parallel_size = {ranks}", str(size))


def _transfer_conflicts(config: DecoderConfig) -> Iterator[Problem]:
    if config.model.transfer.name is None:
        return
    optimizer = config.optimizer
    owners = {f"optimizer.groups[{number}]": (group.name, group.config) for number, group in enumerate(optimizer.groups)}
    for path, (name, chosen) in {"optimizer": (optimizer.name, optimizer.config), **owners}.items():
        if name is not None and not find_component(name, OPTIMIZERS).transfers:
            of = [each for each in known(OPTIMIZERS) if find_component(each, OPTIMIZERS).transfers]
            expected = f"an optimizer for which model.transfer.name={config.model.transfer.name} has rules, {', '.join(of)}"
            yield Problem(f"{path}.name", expected, repr(name))
        patterns = getattr(chosen, "adamw_params", None)
        if patterns is not None and patterns not in (
            fields_dict(type(chosen))["adamw_params"].default,
            ("@embedding", "@head"),
        ):
            expected = "['@embedding', '@head'] beside model.transfer, whose rules are those of Muon for matrices in layers"
            yield Problem(f"{path}.config.adamw_params", expected, str([*patterns]))


def _format_conflicts(config: DecoderConfig) -> Iterator[Problem]:
    known = ("auto", *config.FORMATS)
    for key in ("sources", "valid_sources"):
        for number, source in enumerate(getattr(config.dataset, key)):
            if source.format not in known:
                path, near = f"dataset.{key}[{number}].format", did_you_mean(source.format, known)
                hint = near if near.startswith("did") else ""
                yield Problem(path, " or ".join(known), repr(source.format), hint=hint)
