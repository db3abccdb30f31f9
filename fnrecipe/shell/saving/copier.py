"""Copies of a run's checkpoints at `regime.copy_checkpoints_to`, made beside the steps once a checkpoint is committed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Generic

from fnrecipe.checkpoint import remote
from fnrecipe.config.affects import runtime_paths
from fnrecipe.config.paths import expanded
from fnrecipe.errors import FnrecipeError, UsageError
from fnrecipe.recipe import C
from fnrecipe.runtime.background import Background
from fnrecipe.runtime.remote import RemoteDirectory, remote_directory
from fnrecipe.shell.directory import layout
from fnrecipe.shell.saving.keeping import policy_of
from fnrecipe.shell.saving.local_copies import check_same
from fnrecipe.shell.saving.remote_copies import fetched_records, upload_records
from fnrecipe.shell.session import Session

KEY = "regime.copy_checkpoints_to"


class Copier(Generic[C]):
    """Copies checkpoints, one at a time, the newest one in the end; on the rank that writes, if the config has an address.

    A copy that fails is told, and the run goes on: its checkpoints are whole. Only the last one has to be there at the end.
    """

    # A thread of its own, which the saves do not wait for, nor the other ranks: a network may be slower than the checkpoints
    # come. Those that come meanwhile are left out but for the last; none is queued, so nothing piles up. The copy holds the
    # files of its checkpoint open, so that removing old ones need not wait either.

    def __init__(self, session: Session[C]) -> None:
        self._session = session
        self._there = _there(session)
        self._thread = Background(KEY)
        self._newest: int | None = None
        self._copied: int | None = None

    def begin(self, step: int) -> None:
        """Checks that the address can be written and has no other run, nor this one after `step`, whose copy it begins.

        Raises:
            UsageError: if it has.
            FnrecipeError: if it cannot be written or read.
        """
        there, out = self._there, self._session.out
        if there is None:
            return
        if Path(there.address).resolve() == out.resolve():
            raise UsageError(f"{KEY}: expected another place than the output directory, found {there.address}")
        found = remote.complete(there)
        newest = max(found.values(), default=0)
        if newest > step:
            advice = f"bring it back by `fnrecipe checkpoint copy {there.address} {out}`, or choose another {KEY}"
            raise UsageError(f"{there.address}: has step {newest:,}, and the run in {out} goes on after {step:,}; {advice}")
        with fetched_records(there, [layout.CONFIG]) as run:
            try:
                check_same(out, run, list(runtime_paths(self._session.config)))
            except UsageError as error:
                told = str(error).partition(": ")[2]
                raise UsageError(f"{KEY}: {there.address}: {told}") from None
        upload_records(out, there)
        if step and step not in found.values():
            self.copy(step, -1, {})

    def copy(self, step: int, untouched: int, scores: Mapping[int, float]) -> None:
        """Copies the checkpoint of `step`, unless the copy before is under way; then removes as the config does here."""
        if self._there is None:
            return
        self._newest = step
        if self._thread.busy:
            self._tell(f"step {step:,} is not copied: the copy before it is under way")
        else:
            self._thread.start(partial(self._try, self._there, step, untouched, scores))

    def wait(self, seconds: float | None = None) -> None:
        """Until the copy that is under way has ended."""
        self._thread.wait(seconds)

    def finish(self) -> None:
        """Until the newest checkpoint is copied.

        Raises:
            FnrecipeError: if it cannot be.
        """
        self.wait()
        if self._there is not None and self._newest is not None:
            if self._copied == self._newest:
                upload_records(self._session.out, self._there)  # an evaluation of the last step comes after its save
            else:
                self._copy(self._there, self._newest)

    def _try(self, there: RemoteDirectory, step: int, untouched: int, scores: Mapping[int, float]) -> None:
        try:
            self._copy(there, step)
            policy = policy_of(self._session.config.regime)
            if policy.last is not None:
                remote.prune(there, policy, scores, untouched=untouched)
        except FnrecipeError as error:
            self._tell(f"step {step:,}: {error}; the run goes on, and tries it again with the next checkpoint")

    def _copy(self, there: RemoteDirectory, step: int) -> None:
        out = self._session.out
        upload_records(out, there)  # first: a checkpoint that is complete has its records
        remote.upload(out / layout.CHECKPOINTS / f"step_{step:08d}", there)
        self._copied = step

    def _tell(self, text: str) -> None:
        self._session.display.line(f"{KEY}: {text}")


def forget_copies_after(session: Session[C], step: int) -> None:
    """Removes the copies of checkpoints after `step`, to which a run goes back.

    Raises:
        FnrecipeError: if they cannot be removed.
    """
    if (there := _there(session)) is not None:
        remote.forget_after(there, step)


def _there(session: Session[C]) -> RemoteDirectory | None:
    address = session.config.regime.copy_checkpoints_to
    return remote_directory(expanded(address)) if address is not None and session.gang.leads else None
