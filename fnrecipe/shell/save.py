"""Saving the state of a run."""

from __future__ import annotations

import torch

from fnrecipe import checkpoint, tree
from fnrecipe.data import Cursor, joint
from fnrecipe.errors import NonFiniteError, few
from fnrecipe.observe import Tick
from fnrecipe.recipe import C
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.shell import run_dir
from fnrecipe.shell.keeping import prune
from fnrecipe.shell.session import Session
from fnrecipe.shell.space import check_space
from fnrecipe.step import State


def save(session: Session[C], start: Cursor, tick: Tick) -> None:
    """Saves the state of a tick, and removes what is older than the config keeps; `start` is where the stream began.

    Raises:
        NonFiniteError: if it is not finite: what is saved can always go on.
        CheckpointError: if it finds no space on the disk.
    """
    state, gang = tick.state, session.gang
    check_finite(session, state, f"step {tick.number}: the state, which is not saved,")
    check_space(session, tick.number, state)
    root, cursors = session.out / run_dir.CHECKPOINTS, all_gather_objects(gang, tick.cursor)
    checkpoint.save(root, tick.number, state, joint(start, cursors), session.facts, gang, session.mesh)
    if gang.leads:
        prune(session, tick.number, int(state.skipped))


def check_finite(session: Session[C], state: State, name: str) -> None:
    """Raises NonFiniteError, on all ranks, if parameters, average or optimizer hold numbers that are not finite."""
    leaves = tree.paths({"params": state.params, "optimizer": state.optimizer, "average": state.average})
    good = torch.stack([leaf.isfinite().all() for leaf in leaves.values()]).tolist()
    mine = [path for path, fine in zip(leaves, good, strict=True) if not fine]
    bad = list(dict.fromkeys(path for paths in all_gather_objects(session.gang, mine) for path in paths))
    if bad:
        raise NonFiniteError(f"{name} has numbers that are not finite: {few(bad, 3)}")
