"""Sections of a config as what they stand for: parameters, a function of them, a policy, a schedule, an update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Protocol

import attrs
import torch
from torch import Tensor

from fnrecipe.components.groups import make_update
from fnrecipe.config import (
    LossSection,
    LRSchedulerSection,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    ShellConfig,
    TrainerSection,
)
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.config.sections.optim import LR_SCHEDULERS
from fnrecipe.errors import UsageError
from fnrecipe.generation.generator import Generator, go_on, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.generation.uncached import cached_by, uncached
from fnrecipe.models import adapter, transfer
from fnrecipe.models.flops import TokenFlops
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import Apply
from fnrecipe.nn.attention import AttentionScope
from fnrecipe.nn.noise import Noise
from fnrecipe.nn.objective import Objective
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import Schedule, Schedules, Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree


def init(model: ModelSection, key: Tensor, place: Placement) -> Tree:
    """Parameters in the dtype of the section, with its adapter beside them, each of them as `place(path, leaf)` leaves it."""
    dtype, factors = getattr(torch, model.dtype), transfer.rules(model)

    def scaled(path: str, leaf: Tensor) -> Tensor:
        mine = factors[transfer.role(model, path, leaf.ndim)]
        return leaf if (mine.init, mine.shift) == (1, 0) else leaf * mine.init + mine.shift

    def base() -> Tree:
        return find_model(model.family).init(model.config, key, lambda path, leaf: place(path, scaled(path, leaf).to(dtype)))

    return adapter.init(model, key, place, base)


def trains(model: ModelSection, path: str) -> bool:
    """Whether the parameter at `path` is trained: beside an adapter, nothing is that is not of it."""
    return model.adapter.name is None or path.startswith(f"{adapter.ADAPTER}.")


def merged(model: ModelSection, params: Tree) -> Tree:
    """The parameters of the model, with those of its adapter added to them."""
    return adapter.merged(model.adapter, params)


def apply(model: ModelSection, trainer: TrainerSection, scope: AttentionScope, max_documents: int | None = None) -> Apply:
    """(parameters, tokens, segments, positions, key) -> logits, for rows of at most `max_documents`.

    Parameters without an adapter are those of the model itself, whatever the section says.

    Raises:
        UsageError: for noise that the family does not have.
    """
    family, wanted, how = find_model(model.family), noise(model, trainer), policy(trainer, max_documents)
    if wanted != Noise():
        if family.noisy is None:
            key = "model.dropout_p" if wanted.dropout else "trainer.neftune_noise_alpha"
            found = f"found the family {model.family}, whose Model has no noisy"
            raise UsageError(f"{key}: expected a family that is applied with noise, {found}")
        noisy = partial(family.noisy, model.config, policy=how, scope=scope, noise=wanted)
        return lambda params, tokens, segments, positions, key=None: noisy(
            adapter.adapted(model.adapter, params, key), tokens, segments, positions, key
        )
    plain = partial(family.apply, model.config, policy=how, scope=scope)
    return lambda params, tokens, segments, positions, key=None: plain(
        adapter.adapted(model.adapter, params, key), tokens, segments, positions
    )


def objective(loss: LossSection) -> Objective:
    """What is added to the nats of targets."""
    return Objective(loss.label_smoothing, loss.z_loss)


def noise(model: ModelSection, trainer: TrainerSection) -> Noise:
    """What is random in training."""
    return Noise(model.dropout_p, trainer.neftune_noise_alpha or 0.0)


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


def sample(
    config: Speaking, params: Tree, begin: Sequence[int], key: Tensor, *, vocab_size: int, ends: Collection[int]
) -> list[int]:
    """The tokens that the sample of a run has behind `begin`, at temperature 0.7, to before one of `ends`."""
    made = generator(
        config.model,
        config.trainer,
        Sampling(temperature=0.7),
        context=config.dataset.max_seq_len,
        vocab_size=vocab_size,
        without_cache=config.gang.tensor_parallel_size > 1,  # a single position cannot be cut over ranks
    )
    params, length = adapter.adapted(config.model.adapter, params), config.regime.num_sample_tokens
    return go_on(made, params, begin, key, length, ends)


def policy(trainer: TrainerSection, max_documents: int | None = None) -> Policy:
    checkpointing = trainer.activation_checkpointing
    dtype = getattr(torch, trainer.dtype)
    return Policy(dtype, checkpointing.mode, checkpointing.every_nth_layer, trainer.logits_at_once, max_documents)


def schedule(lr_scheduler: LRSchedulerSection, regime: RegimeSection) -> Callable[[float], Schedule]:
    """The schedule for each peak, over the steps of the regime."""
    return find_component(lr_scheduler.name, LR_SCHEDULERS).make(lr_scheduler.config, regime.num_steps)


def update(
    optimizer: OptimizerSection,
    lr_scheduler: LRSchedulerSection,
    trainer: TrainerSection,
    regime: RegimeSection,
    model: ModelSection | None = None,
) -> Transform:
    """The optimizer and those of its groups on their schedules, behind clipping by the trainer's global norm.

    Rates, decays and epsilons are as the model's transfer, if there is one, changes them.
    """
    own = {"decay": optimizer.weight_decay_scheduler, "momentum": optimizer.momentum_scheduler}
    found = {name: schedule(scheduler, regime) for name, scheduler in own.items() if scheduler is not None}
    schedules = attrs.evolve(Schedules(schedule(lr_scheduler, regime)), **found)
    return make_update(optimizer, schedules, trainer.max_grad_norm, model)
