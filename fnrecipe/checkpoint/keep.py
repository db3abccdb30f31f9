"""What is kept of a run's checkpoints: a pure function from those that there are and a policy to what is to be done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs


@attrs.frozen
class Entry:
    """A checkpoint.

    score       what an evaluation found of its step; None: it found nothing
    model_only  whether it holds the model alone, from which no run can go on
    """

    step: int
    score: float | None = None
    model_only: bool = False


@attrs.frozen
class Policy:
    """What is kept, for whichever reason.

    last             the newest checkpoints, so many of them; None: all, and whole
    every_n_steps    those of steps that are multiples of this
    best             those with the best scores, so many of them
    lower_is_better  which scores are the best
    model_only       whether what is older than the last ones, and kept, keeps its model alone
    """

    last: int | None = None
    every_n_steps: int | None = None
    best: int = 0
    lower_is_better: bool = True
    model_only: bool = False


@attrs.frozen
class Plan:
    """Steps whose checkpoints are kept whole, reduced to their model, and removed; each ascending, and each step in one."""

    whole: tuple[int, ...] = ()
    model_only: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


def plan(entries: Sequence[Entry], policy: Policy, *, untouched: int = -1) -> Plan:
    """What becomes of checkpoints, in any order, one a step; those of steps up to `untouched` neither count nor change.

    The newest whole checkpoint is always kept. One that holds its model alone counts among the best, not among the last.
    """
    there = sorted(entries, key=lambda entry: entry.step)
    counted = [entry for entry in there if entry.step > untouched]
    whole = [entry.step for entry in counted if not entry.model_only]
    last = set(whole if policy.last is None else whole[-max(1, policy.last) :])
    kept = {entry.step for entry in there if entry.step <= untouched} | last | best(counted, policy)
    if policy.every_n_steps is not None:
        kept |= {entry.step for entry in counted if entry.step % policy.every_n_steps == 0}
    slim = {entry.step for entry in there if entry.model_only}
    if policy.model_only:
        slim |= {entry.step for entry in counted if entry.step not in last}
    return Plan(
        tuple(entry.step for entry in there if entry.step in kept and entry.step not in slim),
        tuple(entry.step for entry in there if entry.step in kept and entry.step in slim),
        tuple(entry.step for entry in there if entry.step not in kept),
    )


def best(entries: Sequence[Entry], policy: Policy) -> set[int]:
    """The steps with the best scores; of equal ones the earliest."""
    sign = 1 if policy.lower_is_better else -1
    scored = [(sign * entry.score, entry.step) for entry in entries if entry.score is not None and math.isfinite(entry.score)]
    return {step for _, step in sorted(scored)[: policy.best]}
