"""Where each rank is when one of them hangs: the stacks of all threads, in the rank's log."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from fnrecipe.runtime.gang import Gang

_ASKED, _LOOK = "stacks of all ranks", 1.0


@contextmanager
def stacks_on_demand(gang: Gang, log: Path) -> Iterator[None]:
    """Appends the stacks of this process to `log`, once, when any rank has asked for them."""
    if gang.store is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(gang.store, log, ended), name="stacks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def ask_for_stacks(gang: Gang) -> None:
    """Makes all ranks that can still do anything write their stacks within seconds."""
    if gang.store is not None:
        with suppress(RuntimeError):
            gang.store.set(_ASKED, "")


def _watch(store: Store, log: Path, ended: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone, and with it the rank that keeps it
        while not ended.wait(_LOOK):
            if store.check([_ASKED]):
                _write(log)
                return


def _write(log: Path) -> None:
    with suppress(OSError), log.open("ab") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} a rank does not answer; this one is here:\n".encode())
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
