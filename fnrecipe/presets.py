"""Sections of a config as what they stand for: parameters, a function of them, a policy, a schedule, an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fnrecipe.config import LRSchedulerSection, ModelSection, OptimizerSection, RegimeSection, ShellConfig, TrainerSection
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.config.sections.optim import LR_SCHEDULERS, OPTIMIZERS
from fnrecipe.generation.generator import Generator, go_on, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.generation.uncached import cached_by, uncached
from fnrecipe.models import adapter
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import Apply
from fnrecipe.nn.attention import AttentionScope
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import Schedule, Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree


def init(model: ModelSection, key: Tensor, place: Placement) -> Tree:
    """Parameters in the dtype of the section, with its adapter beside them, each of them as `place(path, leaf)` leaves it."""
    dtype = getattr(torch, model.dtype)

    def base() -> Tree:
        return find_model(model.family).init(model.config, key, lambda path, leaf: place(path, leaf.to(dtype)))

    return adapter.init(model, key, place, base)


def trains(model: ModelSection, path: str) -> bool:
    """Whether the parameter at `path` is trained: beside an adapter, nothing is that is not of it."""
    return model.adapter.name is None or path.startswith(f"{adapter.ADAPTER}.")


def merged(model: ModelSection, params: Tree) -> Tree:
    """The parameters of the model, with those of its adapter added to them."""
    return adapter.merged(model.adapter, params)


def apply(model: ModelSection, trainer: TrainerSection, scope: AttentionScope, max_documents: int | None = None) -> Apply:
    """(parameters, tokens, segments, positions) -> logits, for rows of at most `max_documents`.

    Parameters without an adapter are those of the model itself, whatever the section says.
    """
    plain = partial(find_model(model.family).apply, model.config, policy=policy(trainer, max_documents), scope=scope)
    return plain if model.adapter.name is None else lambda params, *args: plain(adapter.adapted(model.adapter, params), *args)


def flops(model: ModelSection, length: int) -> TokenFlops | None:
    """FLOPs of training on one position of rows of `length`, if the family tells."""
    count = find_model(model.family).flops
    found = count(model.config, length) if count else None
    return found if found is None or model.adapter.name is None else adapter.flops(model, found)


def rules(model: ModelSection) -> Mapping[str, int]:
    """Patterns of parameter paths, and the dimension along which tensor parallelism cuts them."""
    found = find_model(model.family).rules(model.config)
    return found if model.adapter.name is None else {**found, **adapter.rules(found)}


def generator(
    model: ModelSection,
    trainer: TrainerSection,
    sampling: Sampling,
    *,
    context: int,
    vocab_size: int,
    without_cache: bool = False,
) -> Generator[ModelConfig]:
    """The functions of the model that generate, in the trainer's dtype; `without_cache`: without a cache of keys and values."""
    found = find_model(model.family)
    cached = uncached(found.apply) if without_cache else cached_by(found)
    dtype = getattr(torch, trainer.dtype)
    return make_generator(cached, model.config, sampling, context=context, vocab_size=vocab_size, dtype=dtype)


class Speaking(ShellConfig, Protocol):
    """A config of a language model."""

    @property
    def model(self) -> ModelSection: ...


def sample(config: Speaking, params: Tree, begin: Sequence[int], key: Tensor, *, vocab_size: int, eos: int) -> list[int]:
    """The tokens that the sample of a run has behind `begin`, at temperature 0.7, to before `eos`."""
    made = generator(
        config.model,
        config.trainer,
        Sampling(temperature=0.7),
        context=config.dataset.max_seq_len,
        vocab_size=vocab_size,
        without_cache=config.gang.tensor_parallel_size > 1,  # a single position cannot be cut over ranks
    )
    return go_on(made, adapter.adapted(config.model.adapter, params), begin, key, config.regime.num_sample_tokens, eos)


def policy(trainer: TrainerSection, max_documents: int | None = None) -> Policy:
    checkpointing = trainer.activation_checkpointing
    dtype = getattr(torch, trainer.dtype)
    return Policy(dtype, checkpointing.mode, checkpointing.every_nth_layer, trainer.logits_at_once, max_documents)


def schedule(lr_scheduler: LRSchedulerSection, regime: RegimeSection) -> Callable[[float], Schedule]:
    """The schedule for each peak, over the steps of the regime."""
    return find_component(lr_scheduler.name, LR_SCHEDULERS).make(lr_scheduler.config, regime.num_steps)


def update(
    optimizer: OptimizerSection, lr_scheduler: LRSchedulerSection, trainer: TrainerSection, regime: RegimeSection
) -> Transform:
    """The optimizer on that schedule, behind clipping by the trainer's global norm."""
    make = find_component(optimizer.name, OPTIMIZERS).make
    return make(optimizer.config, schedule(lr_scheduler, regime), trainer.max_grad_norm)
