"""Text from the trained model, at the end of a run."""

from __future__ import annotations

from signal import Signals as Signal

from fnrecipe import random
from fnrecipe.recipe import C
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.signals import Stopped
from fnrecipe.shell.directory import layout
from fnrecipe.shell.session import Session
from fnrecipe.transforms import unshard
from fnrecipe.tree import Tree


def sample(session: Session[C], params: Tree) -> Signal | None:
    """Shows and writes the recipe's sample, or gives the signal that ended it, or came before it."""
    if not session.gang.alone:
        if session.gang.leads or session.mesh.cuts:
            _sample(session, params)
        return None
    try:
        with session.signals.interruptible():
            _sample(session, params)
    except Stopped as stopped:
        return stopped.number
    return None


def _sample(session: Session[C], params: Tree) -> None:
    recipe, config = session.recipe, session.config
    if recipe.sample is None or not config.regime.num_sample_tokens:
        return
    key = random.fold_in(random.key(config.common.seed, session.device), "sample")
    text = recipe.sample(config, params if session.mesh.sharding == "fsdp" else unshard(params), key)
    if session.gang.leads:
        replace(session.out / layout.SAMPLE, f"{text}\n".encode())
    session.display.line(f"sample:\n{text}")
