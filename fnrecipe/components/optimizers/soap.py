"""SOAP for matrices, Adam for vectors; defaults are those of the authors' code.

But the rows of embeddings and the head, which are tokens, are not turned, however few there are. In the authors' trainings
they are not, for 32 thousand are above `max_precondition_dim`. Turned, rare and frequent tokens would share their mean squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from fnrecipe.components.component import Optimizer
from fnrecipe.config.bounds import NonNegative, NonNegativeInt, Positive, PositiveInt, ProperFraction
from fnrecipe.config.patterns import fits, tag_conflicts
from fnrecipe.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fnrecipe.optim import Schedules, Transform


@frozen
class SOAPConfig:
    """`precondition_frequency`: in which updates bases are renewed; sides above `max_precondition_dim` have none.

    `one_sided_params`: patterns of the paths, or tags, of the matrices whose rows have none either.
    """

    lr: NonNegative = 3e-3
    betas: tuple[ProperFraction, ProperFraction] = (0.95, 0.95)
    shampoo_beta: ProperFraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decay_vectors: bool = False
    cautious_weight_decay: bool = False
    precondition_frequency: PositiveInt = 10
    max_precondition_dim: NonNegativeInt = 10_000
    one_sided_params: tuple[str, ...] = ("@embedding", "@head")

    def conflicts(self) -> Iterator[Problem]:
        yield from tag_conflicts("one_sided_params", self.one_sided_params)


def soap(config: SOAPConfig, schedule: Schedules, max_norm: float | None) -> Transform:
    from fnrecipe import optim

    def one_sided(path: str, parameter: Tensor) -> bool:
        return parameter.ndim == 2 and fits(path, 2, config.one_sided_params)

    turned = partial(
        optim.scale_by_soap,
        *config.betas,
        config.eps,
        shampoo_decay=config.shampoo_beta,
        every=config.precondition_frequency,
        max_dim=config.max_precondition_dim,
    )
    adam = optim.scale_by_adam(*config.betas, config.eps)
    others = optim.split(lambda path, parameter: parameter.ndim == 2, turned(), adam)
    return optim.descent(
        optim.split(one_sided, turned(rows=False), others),
        schedule=schedule(config.lr),
        weight_decay=schedule.decay(config.weight_decay),
        mask=optim.decaying(config.decay_vectors),
        max_norm=max_norm,
        cautious_weight_decay=config.cautious_weight_decay,
    )


optimizer = Optimizer(SOAPConfig, soap, moments=2)
