"""From the section `evaluations` of a config to what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import attrs
import torch

from fnrecipe.compiler import interpreter
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.config import DataSource, EvaluationSection
from fnrecipe.config.sections.evaluation import ChoicesConfig, HeldOutConfig, SamplesConfig
from fnrecipe.data import LaneAssignment, Source, Tokenizer
from fnrecipe.evaluations.choices import choices
from fnrecipe.evaluations.config import NamingConfig
from fnrecipe.evaluations.samples import samples
from fnrecipe.loss import Loss
from fnrecipe.recipe import Evaluation, Measure, Measurement
from fnrecipe.tree import Tree

C = TypeVar("C", bound=NamingConfig)


def named_evaluations(
    config: C,
    *,
    stream: Callable[[C, LaneAssignment], Source[Tree]],
    loss: Callable[[C], Loss],
    tokenizer: Callable[[C], Tokenizer],
    encode: Callable[[C, str], Sequence[int]],
) -> Mapping[str, Evaluation[C] | Measurement[C]]:
    """The evaluations that a config names.

    stream     (config, assignment) -> the validation batches
    loss       config -> the loss on them
    encode     (config, prompt) -> the tokens that the model goes on from
    """

    def made(section: EvaluationSection) -> Evaluation[C] | Measurement[C]:
        own, every = section.config, section.every_n_steps
        if isinstance(own, HeldOutConfig):
            sources = own.sources
            return Evaluation(
                lambda config, assignment: stream(held_out(config, sources), assignment),
                lambda config: loss(held_out(config, sources)),
                every,
            )

        def measure(config: C, device: torch.device) -> Measure[list[float]] | Measure[list[dict[str, str | int]]]:
            if isinstance(own, ChoicesConfig):
                backend = None if jit_mode(config.trainer.jit, device) == "off" else interpreter
                return choices(config, tokenizer(config), own.file, own.delimiter, device, backend)
            assert isinstance(own, SamplesConfig)
            return samples(config, tokenizer(config), own, section.name, lambda text: encode(config, text), device)

        return Measurement(measure, every)

    return {section.name: made(section) for section in config.evaluations}


def held_out(config: C, sources: Sequence[DataSource]) -> C:
    """The config whose validation documents are all of `sources`, and which has no others."""
    dataset = attrs.evolve(config.dataset, sources=(), valid_sources=tuple(sources), valid_fraction=0.0)
    return attrs.evolve(config, dataset=dataset)  # type: ignore[misc]
