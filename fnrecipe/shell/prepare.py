"""What a process of a run does before anything else: it joins its gang, and claims the directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fnrecipe import checkpoint
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.config import RegimeSection, unstructure
from fnrecipe.config.affects import runtime_paths
from fnrecipe.config.layers import flatten, values
from fnrecipe.data import Corpus, tell_left_out
from fnrecipe.data.changes import stamps
from fnrecipe.errors import UsageError
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang, apart, check_same, joined, world_size
from fnrecipe.runtime.last_words import last_words
from fnrecipe.runtime.process_groups import axis_sizes, check_world_size, make_mesh
from fnrecipe.runtime.signals import Signals
from fnrecipe.runtime.stacks import stacks_on_demand
from fnrecipe.shell.directory import layout, lock, same_run
from fnrecipe.shell.directory.identity import identity
from fnrecipe.shell.directory.shared import check_shared
from fnrecipe.shell.screen.display import Display
from fnrecipe.shell.session import Session
from fnrecipe.shell.trained.export import exportable


def prepared(stack: ExitStack, recipe: Recipe[C], config: C, out: Path, with_changes: bool, started: float) -> Session[C]:
    """A process that has joined its gang and claimed the directory; `stack` undoes all of it."""
    replicas, shards, _ = axis_sizes(config.gang, world_size())
    cut = {"gang.num_microbatches": config.gang.num_microbatches, "dataset.num_lanes": config.dataset.num_lanes}
    check_world_size(cut, replicas * shards)
    device = host.pick_device(config.gang.device)
    gang = stack.enter_context(joined(device, config.gang.timeout))
    stack.enter_context(stacks_on_demand(gang, out / layout.log(gang.rank)))
    stack.enter_context(last_words(gang))
    seconds = _seconds_left(config.regime, started) if gang.leads else None
    parting = partial(_parting, out, gang)
    signals = stack.enter_context(Signals(parting, seconds=seconds, at_once=gang.alone, once=not gang.alone))
    claim = stack.enter_context(lock.claimed(out)) if gang.leads else None
    if claim is not None and not with_changes:
        same_run.check_config(out, unstructure(config), set(runtime_paths(config)), unstructure(type(config)()))
    if config.regime.export_hugging_face:
        exportable(recipe, config)
    corpora: Sequence[Corpus] = recipe.corpora(config) if recipe.corpora else []
    before = stamps(corpora) if gang.leads else {}
    facts = identity(recipe, config, corpora)
    check_same(gang, {**values(flatten(unstructure(config), "")), **host.versions(), **facts})
    check_shared(out, gang)
    with lock.writing(out):
        display = Display(out / layout.log(gang.rank), config.regime.num_steps, quiet=not gang.leads)
    stack.enter_context(display)
    host.prepare(config.common.torch, jit_mode(config.trainer.jit, device))
    tell_left_out(corpora if gang.leads else [])
    mesh = make_mesh(config.gang, gang, device, recipe.rules(config))
    beside = apart(gang, config.gang.timeout)
    return Session(recipe, config, (out, claim), facts, device, gang, beside, mesh, signals, display, started, before)


def _seconds_left(regime: RegimeSection, started: float) -> float | None:
    """Seconds until `regime.max_minutes` are over.

    Raises:
        UsageError: in a thread that hears no signals, which the end of this time is.
    """
    if regime.max_minutes is None:
        return None
    if threading.current_thread() is not threading.main_thread():
        expected = "null for a run in another thread than the main one, which hears no signals"
        raise UsageError(f"regime.max_minutes: expected {expected}, found {regime.max_minutes:g}")
    return started + 60 * regime.max_minutes - time.monotonic()


def _parting(out: Path, gang: Gang) -> str:
    """What is said when a second signal ends a run at once."""
    if not gang.leads:
        return ""
    saved = checkpoint.committed(out / layout.CHECKPOINTS)
    where = f"the newest checkpoint is {saved[-1]}, and the same command goes on from there" if saved else "nothing was saved"
    return f"\nended at once: {where}\n"
