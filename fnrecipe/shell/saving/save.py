"""Saving the states of a run, by default beside the steps that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from socket import gethostname
from typing import Generic

import torch
from torch import Tensor

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint import Snapshot
from fnrecipe.data import Cursor, joint
from fnrecipe.errors import NonFiniteError, few, one_line
from fnrecipe.observe import Tick
from fnrecipe.recipe import C
from fnrecipe.runtime import capacity
from fnrecipe.runtime.background import Background
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.runtime.last_words import lost_contact
from fnrecipe.shell.directory import layout
from fnrecipe.shell.saving.copier import Copier
from fnrecipe.shell.saving.keeping import model_parts, policy_of, scores_of
from fnrecipe.shell.saving.space import check_space
from fnrecipe.shell.session import Session
from fnrecipe.step import State

_PATIENCE = 10.0
"""Seconds for which a run that has lost a rank waits for a save."""


@contextmanager
def saving(session: Session[C], step: int, start: Cursor) -> Iterator[Saver[C]]:
    """What saves the states of a run that goes on after `step`, whose stream began at `start`.

    Where the context ends, so has what it began to save, and its copy.

    Raises:
        UsageError: if copies are to go to where another run is.
        FnrecipeError, OSError: that of a save, or of the last copy, if nothing else ends the run.
    """
    saver = Saver(session, start)
    saver.copier.begin(step)
    try:
        yield saver
    except BaseException as error:
        saver.end_after(error)
        raise
    saver.wait()
    saver.copier.finish()


class Saver(Generic[C]):
    """Saves states, one at a time.

    With `regime.checkpoint_in_background` a step waits only for a copy in host memory, which is kept for the next save. What
    follows is done on a thread, by the same functions in the same order as without it.
    """

    # The ranks' threads talk to each other by a process group of their own: collectives of one group have to be called in the
    # same order on all ranks, and nothing orders a thread's among those of the steps. All phases of a save are on the thread,
    # so its order is that of the saves. A rank that copies nothing, for want of memory, joins the others from its main thread.

    def __init__(self, session: Session[C], start: Cursor) -> None:
        self._session, self._start = session, start
        self.copier = Copier(session)
        # None: whether there is memory for it, the first state tells.
        self._beside = None if session.config.regime.checkpoint_in_background else False
        self._thread = Background("regime.checkpoint_in_background")
        self._host: dict[str, Tensor] = {}

    def save(self, tick: Tick) -> None:
        """Saves the state of a tick once the save before has ended, and removes what is older than the config keeps.

        Raises:
            NonFiniteError: if it is not finite: what is saved can always go on.
            CheckpointError: if it finds no space on the disk.
            FnrecipeError, OSError: that of this save or, beside the steps, of the one before.
        """
        session, state = self._session, tick.state
        self.wait()
        check_finite(session, state, f"step {tick.number}: the state, which is not saved,")
        check_space(session, tick.number, state)
        cursor = joint(self._start, all_gather_objects(session.gang, tick.cursor))
        taken = checkpoint.snapshot(state, session.mesh)
        scores = scores_of(session.out, session.config.regime) if session.gang.leads else {}
        skipped = int(state.skipped)
        untouched = tick.number - skipped if skipped else -1  # what is older may be what helps a user who cannot go on
        write = partial(self._write, tick.number, cursor=cursor, untouched=untouched, scores=scores)
        if self._copies(taken):
            copy = checkpoint.copied(taken, self._host)
            self._host = dict(copy.tensors)
            self._thread.start(partial(write, copy))
        else:
            write(taken)

    def check(self) -> None:
        """Raises the error of a save that has failed beside the steps."""
        self._thread.check()

    def wait(self) -> None:
        """Until what is being saved is there.

        Raises:
            FnrecipeError, OSError: if it cannot be saved.
        """
        self._thread.wait()

    def end_after(self, error: BaseException) -> None:
        """Waits, as `wait` does, in a run that `error` ends: shortly if that may be the loss of a rank.

        Raises:
            FnrecipeError, OSError: that of the save, if `error` is no more than the loss of ranks, which have ended by it.
        """
        lost = lost_contact(error)
        try:
            self._thread.wait(_PATIENCE if lost else None)
        except Exception as problem:
            if lost and not lost_contact(problem):
                raise problem from error
            if not lost:
                self._session.display.line(f"the save that was under way has failed, too: {one_line(str(problem))}")
        finally:
            self.copier.wait(_PATIENCE if lost else None)

    def _write(self, step: int, taken: Snapshot, *, cursor: Cursor, untouched: int, scores: Mapping[int, float]) -> None:
        session = self._session
        checkpoint.write(session.out / layout.CHECKPOINTS, step, taken, cursor, session.facts, session.beside)
        if session.gang.leads:
            self.copier.copy(step, untouched, scores)
            _prune(session, untouched, scores)

    def _copies(self, taken: Snapshot) -> bool:
        """Whether states are copied: if the config says so, and this machine has memory for the copies of all its ranks."""
        if self._beside is None:
            sizes = all_gather_objects(self._session.gang, (gethostname(), taken.num_bytes))
            needed, free = sum(size for host, size in sizes if host == gethostname()), capacity.free_memory()
            self._beside = free is None or needed <= free
            if free is not None and not self._beside:
                found = f"a copy of the state takes {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free"
                self._session.display.line(f"regime.checkpoint_in_background: {found}; steps wait for saves")
        return self._beside


def _prune(session: Session[C], untouched: int, scores: Mapping[int, float]) -> None:
    """Keeps what the config and the `scores` of steps say, and the checkpoints up to the step `untouched` as they are."""
    policy = policy_of(session.config.regime)
    if policy.last is not None:
        model = model_parts(session.recipe, session.config)
        checkpoint.prune(session.out / layout.CHECKPOINTS, policy, scores, untouched=untouched, model=model)


def check_finite(session: Session[C], state: State, name: str) -> None:
    """Raises NonFiniteError, on all ranks, if parameters, average or optimizer hold numbers that are not finite."""
    leaves = tree.paths({"params": state.params, "optimizer": state.optimizer, "average": state.average})
    floats = {path: leaf for path, leaf in leaves.items() if leaf.is_floating_point() and leaf.numel()}
    # The least and the greatest number of a tensor are NaN if one of its numbers is; a mask of all takes 15 times as long.
    good = torch.stack([torch.stack(leaf.aminmax()).isfinite().all() for leaf in floats.values()]).tolist() if floats else []
    mine = [path for path, fine in zip(floats, good, strict=True) if not fine]
    bad = list(dict.fromkeys(path for paths in all_gather_objects(session.gang, mine) for path in paths))
    if bad:
        raise NonFiniteError(f"{name} has numbers that are not finite: {few(bad, 3)}")
