"""Read ahead in processes: each takes some of this rank's lanes, as if it were a rank of its own.

The rows, their order and the cursors are those of one process, whatever the number of workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from fnrecipe.data.lanes import LaneAssignment, joint
from fnrecipe.data.rows import B, join
from fnrecipe.data.stream import Cursor, Source, Stream, T
from fnrecipe.errors import FnrecipeError

_log = logging.getLogger(__name__)


def in_worker_processes(
    make: Callable[[LaneAssignment], Source[B]],
    cursor: Cursor = None,
    *,
    assignment: LaneAssignment,
    workers: int,
    size: int,
    padding: B,
) -> Stream[B]:
    """The batches of `make(assignment)` from `workers` processes, each up to `size` batches ahead.

    `padding` is the batch that stands for one of a worker whose stream has ended while those of others go on. `make` and the
    batches are pickled, between this process and its own children only. An error in a worker is raised with the worker's
    traceback as a note; closing the stream ends the processes.

    Raises:
        FnrecipeError: if a worker dies.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(_started(make, part, cursor, size)) for part in assignment.split(workers)]
        entries: list[tuple[B | None, Cursor]] = [(None, cursor)] * workers
        while True:
            entries = [next(part, (None, after)) for part, (_, after) in zip(parts, entries, strict=True)]
            if all(batch is None for batch, _ in entries):
                return
            yield (
                join([padding if batch is None else batch for batch, _ in entries]),
                joint(cursor, (after for _, after in entries)),
            )


def in_process(
    make: Callable[[LaneAssignment], Source[T]], assignment: LaneAssignment, cursor: Cursor = None, *, size: int
) -> Generator[tuple[T, Cursor], None, None]:
    """The stream `make(assignment)(cursor)` from a process of its own, up to `size` items ahead of its consumer."""
    with _started(make, assignment, cursor, size) as stream:
        yield from stream


@contextmanager
def _started(
    make: Callable[[LaneAssignment], Source[T]], assignment: LaneAssignment, cursor: Cursor, size: int
) -> Iterator[Stream[T]]:
    """The stream of a process that runs from now on to the end of the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    args = theirs, make, assignment, cursor, max(size, 1)
    process = context.Process(
        target=_serve, args=args, name=f"data {assignment.rank * assignment.workers + assignment.worker}", daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield _items(ours, process)
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


def _items(pipe: Connection, process: BaseProcess) -> Stream[Any]:
    while True:
        kind, content = _receive(pipe, process)
        if kind == "warning":
            message, once = content
            _log.warning("%s", message, extra={"once": once})
        elif kind == "error":
            error, trace = content
            error.add_note(f"in {process.name}:\n{trace}")
            raise error
        elif kind == "end":
            return
        else:
            yield content
            with suppress(BrokenPipeError, ConnectionResetError):  # of one that has ended, the rest is still to be read
                pipe.send_bytes(b"more")


def _receive(pipe: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        wait([pipe, process.sentinel])
        if pipe.poll():
            message: tuple[str, Any] = pipe.recv()
            return message
    except (EOFError, OSError):  # also in the middle of a message
        pass
    process.join()
    status = process.exitcode
    assert status is not None
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    raise FnrecipeError(f"a worker of the data ({process.name}) ended {how} before its stream did; out of memory?")


class _Forward(logging.Handler):
    """Sends warnings to the process that reads the stream."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send(("warning", (record.getMessage(), getattr(record, "once", None))))


def _serve(
    pipe: Connection, make: Callable[[LaneAssignment], Source[object]], assignment: LaneAssignment, cursor: Cursor, ahead: int
) -> None:
    """The worker: `ahead` items, and one for each word from the consumer, whose end closes when it ends, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # sent to all, but meant for the consumer
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("fnrecipe").addHandler(_Forward(pipe))
    try:
        for entry in make(assignment)(cursor):
            while not ahead or pipe.poll():
                pipe.recv_bytes()
                ahead += 1
            pipe.send(("item", entry))
            ahead -= 1
        pipe.send(("end", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        known = error if isinstance(error, FnrecipeError) else RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(("error", (known, traceback.format_exc())))
