"""The update: optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from fnrecipe.config.bounds import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, ProperFraction, StepFraction


@frozen
class AdamWConfig:
    lr: NonNegative = 3e-4
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1


@frozen
class OptimizerSection:
    name: Literal["adamw"] = "adamw"
    config: AdamWConfig = field(factory=AdamWConfig)


@frozen
class CosineAnnealingConfig:
    """`num_warmup_steps`: a number of steps, or a fraction of all steps (`schedule_steps`).

    `cycle_len`: steps from the peak to the final rate; null: all that `regime.num_steps` leaves after warm-up.
    """

    num_warmup_steps: NonNegativeInt | StepFraction = 0
    cycle_len: PositiveInt | None = None
    final_lr_scale: Fraction = 0.1


def schedule_steps(schedule: CosineAnnealingConfig, num_steps: int | None) -> tuple[int, int]:
    """Steps of warm-up, and steps up to the final rate, of a training of `num_steps` steps.

    A fraction of warm-up is one of `num_steps`, or, where that is None, of warm-up and cycle together; it is rounded, but never
    up to all steps.
    """
    written, cycle = schedule.num_warmup_steps, schedule.cycle_len
    if isinstance(written, int):
        warmup = written
    elif num_steps is not None:
        warmup = min(round(written * num_steps), num_steps - 1)
    else:
        warmup = round((cycle or 0) * written / (1 - written))
    return warmup, warmup + cycle if cycle else num_steps or 1


@frozen
class LRSchedulerSection:
    name: Literal["cosine_annealing"] = "cosine_annealing"
    config: CosineAnnealingConfig = field(factory=CosineAnnealingConfig)
