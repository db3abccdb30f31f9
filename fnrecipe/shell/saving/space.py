"""Whether the checkpoints of a run find space on the disk: told before anything is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from fnrecipe.checkpoint import Policy, num_bytes
from fnrecipe.config import RegimeSection
from fnrecipe.errors import CheckpointError
from fnrecipe.recipe import C
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.shell.directory import layout
from fnrecipe.shell.saving.keeping import model_parts, policy_of
from fnrecipe.shell.session import Session
from fnrecipe.step import State

_ADVICE = "regime.keep_last_n_checkpoints, keep_checkpoint_every_n_steps and keep_model_only say what is kept"


def check_space(session: Session[C], step: int, state: State) -> None:
    """Checks that the checkpoint of a step finds space, as far as the file system tells: quotas show when it is written.

    Raises:
        CheckpointError: on all ranks, with the bytes that are missing.
    """
    root = session.out / layout.CHECKPOINTS
    problem = _lack(root, step, num_bytes(state)) if session.gang.leads else ""
    if problem := all_gather_objects(session.gang, problem)[0]:
        raise CheckpointError(problem)


def _lack(root: Path, step: int, needed: int) -> str:
    """What is missing for the checkpoint of a step below `root`; empty if nothing is, or if it is there."""
    directory, free = root / f"step_{step:08d}", free_bytes(root)
    if needed <= free or directory.exists():
        return ""
    return (
        f"{directory}: cannot save it, and nothing was written: expected {needed:,} bytes of free space, found {free:,}. "
        f"Make room for {needed - free:,} bytes, and the same command goes on from the checkpoint before; {_ADVICE}"
    )


def warn_of_space(session: Session[C], step: int, state: State) -> None:
    """One line if all the checkpoints that the config will keep, behind a step, clearly do not find space."""
    regime = session.config.regime
    if not session.gang.leads or (regime.num_steps is not None and step >= regime.num_steps):
        return
    root, parts = session.out / layout.CHECKPOINTS, model_parts(session.recipe, session.config)
    whole, models = most_at_once(regime, policy_of(regime))
    size, small = num_bytes(state), num_bytes(state, lambda name: name.split(".")[0] in parts)
    needed, free = whole * size + models * small, free_bytes(root) + _occupied(root)
    if needed > free:
        kinds = [f"{whole:,} of {size:,} bytes", *([f"{models:,} models alone of {small:,}"] if models else [])]
        session.display.line(
            f"the checkpoints of this config take up to {needed:,} bytes ({' and '.join(kinds)}), "
            f"and there is space for {free:,}; {_ADVICE}"
        )


def most_at_once(regime: RegimeSection, policy: Policy) -> tuple[int, int]:
    """How many checkpoints, and how many models alone, there are at most at once; an endless number does not count."""
    steps, every = regime.num_steps, regime.checkpoint_every_n_steps
    saves = None if steps is None or regime.checkpoint_every_n_minutes else math.ceil(steps / (every or steps))
    if policy.last is None:
        return saves or 1, 0
    older = policy.best
    if policy.every_n_steps is not None and steps is not None and every is not None:
        older += steps // math.lcm(policy.every_n_steps, every)
    last = policy.last + 1  # the newest is there before the oldest goes
    whole, models = (last, older) if policy.model_only else (last + older, 0)
    return (whole, models) if saves is None else (min(whole, saves), min(models, max(saves - policy.last, 0)))


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write below `path`, or where it is to be made."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(there).free


def _occupied(root: Path) -> int:
    """Bytes of the checkpoints that are there."""
    return sum(path.stat().st_size for path in root.glob("*/*.safetensors") if path.is_file())
