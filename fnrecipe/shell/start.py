"""How a process of a run begins: with a new state, or with that of the newest checkpoint."""

from __future__ import annotations

import torch

from fnrecipe import checkpoint, tree
from fnrecipe.build import init_train_state
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.config import ModelSection
from fnrecipe.errors import CheckpointError, UsageError
from fnrecipe.observe import Tick
from fnrecipe.parallel.mesh import global_slice, is_shard
from fnrecipe.recipe import C
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.shell.directory import layout, same_run
from fnrecipe.shell.directory.identity import TOKENIZER
from fnrecipe.shell.saving.aside import set_aside
from fnrecipe.shell.saving.restore import restored
from fnrecipe.shell.saving.save import check_finite
from fnrecipe.shell.session import Session


def first_tick(session: Session[C], *, with_changes: bool, from_step: int | None = None) -> Tick:
    """The state to begin with, the stream's cursor behind it, and its step: of the newest checkpoint, or that of `from_step`.

    What is newer than `from_step` is set aside, once nothing else can go wrong.

    Raises:
        CheckpointError: if the checkpoint is not one of this run.
        UsageError: if it was made from other data, unless `with_changes`.
    """
    display, out = session.display, session.out
    found = _found(session, from_step)
    if found is None:
        _tell_weights(session)
    state = init_train_state(session.recipe, session.config, session.mesh, session.device, pretrained=found is None)
    size = sum(global_slice(leaf)[0].numel() for leaf in tree.leaves(state.params, is_shard))
    ranks = "" if session.gang.alone else f", {session.gang.size} ranks"
    where = f"{session.device.type} ({torch.get_num_threads()} threads{ranks})"
    display.line(f"{session.recipe.name}: {size:,} parameters on {where}, in {out}")
    if TOKENIZER in session.facts:
        display.line(f"tokenizer: {session.facts[TOKENIZER]}")
    if found is not None:
        if not with_changes:
            same_run.check_identity(out, found.files, session.facts)
        state = restored(session, found, state)
        if int(state.step) != found.step:
            expected = f"expected the state of step {found.step}, found that of {int(state.step)}"
            raise CheckpointError(f"{found.directory}: {expected}")
        display.line(f"going on after step {found.step:,}")
    check_finite(session, state, f"{found.directory}: the checkpoint" if found else "the first state")
    step, cursor = (found.step, found.cursor) if found else (0, None)
    if session.gang.leads:
        if from_step is not None and (place := set_aside(out, from_step)):
            display.line(f"newer than step {step:,}: set aside, with its records, as the run {place}")
        checkpoint.tidy(out / layout.CHECKPOINTS, step)
    return Tick(step, cursor, states=[state])


def _found(session: Session[C], from_step: int | None) -> Checkpoint | None:
    root = session.out / layout.CHECKPOINTS
    if from_step is None:
        return checkpoint.newest(root, session.display.line, session.gang)
    found = checkpoint.of_step(root, from_step, session.gang)
    if "step" not in found.tensors:
        raise CheckpointError(f"{found.directory}: expected a checkpoint to go on from, found one that holds its model alone")
    return found


def _tell_weights(session: Session[C]) -> None:
    """A line for the weights that a run begins with, where the config names any, or an adapter that would need them.

    Raises:
        UsageError: if the recipe does not read any.
    """
    model = getattr(session.config, "model", None)
    path = getattr(model, "path", None)
    if path is not None and session.recipe.pretrained is None:
        expected = f"null: the recipe {session.recipe.name} has no `pretrained`, which reads weights"
        raise UsageError(f"model.path: expected {expected}; found {path}")
    if path is not None:
        session.display.line(f"weights: {path}")
    elif isinstance(model, ModelSection) and model.adapter.name is not None:
        expected = f"weights for model.adapter.name={model.adapter.name} to be beside"
        session.display.line(f"model.path: expected {expected}, found null: they are random, and stay so")


def wait_for_leader(session: Session[C], step: int) -> None:
    """Until the leader has rewound the records to `step`: nobody looks at them before."""
    all_gather_objects(session.gang, step)
