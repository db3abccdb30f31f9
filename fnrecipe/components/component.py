"""What a module of a component holds, one that comes with fnrecipe or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs

if TYPE_CHECKING:
    from fnrecipe.models import answers
    from fnrecipe.optim import Schedule, Schedules, Transform

C = TypeVar("C")


@attrs.frozen
class LRScheduler(Generic[C]):
    """A kind of schedule.

    config  the class of its configs: frozen, by attrs, with a default for each field
    make    (config, steps of the training or None) -> the schedule for each peak
    """

    config: type[C]
    make: Callable[[C, int | None], Callable[[float], Schedule]]


@attrs.frozen
class Optimizer(Generic[C]):
    """A kind of optimizer.

    config   the class of its configs: frozen, by attrs, with a default for each field
    make     (config, schedules, largest global norm of gradients or None) -> transform; `schedules(peak)` is a rate at each
             step, `schedules.decay(number)` a weight decay, `schedules.momentum(number)` a momentum
    momentum   config -> its momentum, or first beta, if it is made from `schedules.momentum`
    transfers  whether updates do not depend on the scale of a matrix's gradients but for `eps`: so `model.transfer` has rules
               for it
    width_power  config -> what power of the width those changes grow with that its updates of matrices make to their outputs:
                 1 where each element moves by as much at any width, as Adam's do
    moments  tensors like the parameters that it keeps at least: what does not fit is refused beforehand
    low_precision  whether these may have a `state_dtype` of their own: moments of single elements, as `optim.low_precision`
                   keeps them
    """

    config: type[C]
    make: Callable[[C, Schedules, float | None], Transform]
    moments: int = 0
    momentum: Callable[[C], float] | None = None
    transfers: bool = False
    width_power: Callable[[C], float] = lambda config: 1.0
    low_precision: bool = False


@attrs.frozen
class Criterion(Generic[C]):
    """A kind of loss of preferences.

    config     the class of its configs: frozen, by attrs, with a default for each field
    make       config -> what it makes of the log-probabilities of answers
    reference  whether it takes those of a reference model too
    pairs      whether it compares two answers to a prompt; or judges each by itself, and takes answers to other prompts beside
    """

    config: type[C]
    make: Callable[[C], answers.Judge]
    reference: bool = False
    pairs: bool = True
