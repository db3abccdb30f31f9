"""The state of a checkpoint as that of a run that goes on from it."""

from __future__ import annotations

import attrs
import torch

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.recipe import C
from fnrecipe.shell.session import Session
from fnrecipe.step import State


def restored(session: Session[C], found: Checkpoint, state: State) -> State:
    """The state of a checkpoint, like `state`; with an empty window of spikes where it has none, or one of another size.

    Raises:
        CheckpointError: if they do not fit otherwise, or it cannot be read.
    """
    window = tree.paths({"spikes": state.spikes})
    saved = {path: entry for path, entry in found.tensors.items() if path.startswith("spikes.")}
    if {path: list(entry.shape) for path, entry in saved.items()} == {path: list(leaf.shape) for path, leaf in window.items()}:
        whole: State = checkpoint.restore(found, state)
        return whole
    if window:
        session.display.line("the window of steps by which spikes are judged begins empty")
    others = {path: entry for path, entry in found.tensors.items() if path not in saved}
    without: State = checkpoint.restore(attrs.evolve(found, tensors=others), attrs.evolve(state, spikes=()))
    return attrs.evolve(without, spikes=tree.map(torch.zeros_like, state.spikes))
