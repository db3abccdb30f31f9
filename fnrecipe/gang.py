"""The gang: the processes of a run, as their launcher started them, and what their shells tell each other.

They speak JSON over gloo: nothing is unpickled, and the device is not waited for. The step's own collectives go over the axes
of a mesh (`fnrecipe.parts`), in `fnrecipe.transforms.reduce`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import Signals as Signal
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fnrecipe.data import Batch, Cursor, Source, Stream
from fnrecipe.errors import LostError, UsageError
from fnrecipe.launcher import export, launched, meeting
from fnrecipe.signals import Stopped


@attrs.frozen(eq=False)
class Gang:
    """This process's place in the gang.

    rank, size   its number, and how many there are
    control      the gloo group of the shells
    store        where ranks leave their last words
    """

    rank: int = 0
    size: int = 1
    control: Any = None
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


@contextmanager
def joined(device: torch.device, minutes: float) -> Iterator[Gang]:
    """The gang that the environment names, for as long as the context lasts; a gang of one if it names none.

    Raises:
        LostError: if the others do not come within `minutes`.
    """
    size, rank = world_size(), launched().rank
    if size == 1:
        yield Gang()
        return
    timeout = timedelta(minutes=minutes)
    try:
        store = _store(size, timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise LostError(f"the processes of the run did not find each other: {_on_one_line(error)}") from error
    try:
        yield Gang(rank, size, control, store)
    finally:
        dist.destroy_process_group()


def _store(size: int, timeout: timedelta) -> Any:
    """The store of all ranks: a file of those that `--nproc` started, or else a server at MASTER_ADDR."""
    directory = meeting()
    if directory is not None:
        return dist.FileStore(str(directory / "store"), size)  # type: ignore[attr-defined]
    store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # so that no address of an attempt before is found
    return PrefixStore(f"attempt {attempt}", store)


def gather(gang: Gang, value: Any) -> list[Any]:
    """The JSON values of all ranks, in their order."""
    if gang.alone:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(gang.size)]
    dist.all_gather(sizes, torch.tensor(len(mine)), group=gang.control)
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=gang.control)
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def last_words(gang: Gang) -> Iterator[None]:
    """Leaves word of what ends this rank; if that is the loss of another one, it is told by that one's word or by its silence.

    Raises:
        LostError: for a rank that is gone or does not answer.
    """
    try:
        yield
    except BaseException as error:
        if gang.alone:
            raise
        lost = isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error))
        with suppress(RuntimeError):
            gang.store.set(_word(gang.rank), "" if lost else (str(error) or type(error).__name__))
        if lost:
            raise LostError(_blame(gang, error)) from error
        raise


def _blame(gang: Gang, error: BaseException, seconds: float = 3.0) -> str:
    """Which ranks are the cause of the end: those that left word of another cause, or else those that left none in time.

    If all ranks have lost each other, as by NCCL with two of them on one GPU, the cause is the `error` itself.
    """
    others, deadline = [rank for rank in range(gang.size) if rank != gang.rank], time.monotonic() + seconds
    words: dict[int, str] = {}
    with suppress(RuntimeError):
        while len(words) < len(others) and time.monotonic() < deadline:
            found = [rank for rank in others if rank not in words and gang.store.check([_word(rank)])]
            words |= {rank: gang.store.get(_word(rank)).decode() for rank in found}
            time.sleep(0.05)
    causes = [f"rank {rank} failed: {word}" for rank, word in words.items() if word]
    silent = [f"rank {rank} does not answer: it hangs or was killed" for rank in others if rank not in words]
    return "; ".join(causes or silent) or f"the ranks lost contact: {_on_one_line(error)}"


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _word(rank: int) -> str:
    return f"last word of rank {rank}"


def check_same(gang: Gang, facts: Mapping[str, Any]) -> None:
    """Whether all ranks hold the same facts.

    Raises:
        UsageError: naming the first rank that differs from rank 0, and in what.
    """
    first, *others = gather(gang, dict(facts))
    for rank, other in enumerate(others, 1):
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if names:
            lines = [f"  {name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}" for name in names[:10]]
            raise UsageError("\n".join([f"rank {rank}: expected what rank 0 has, found a difference", *lines]))


def together(source: Source[Batch], cursor: Cursor = None, *, gang: Gang, word: Callable[[], int]) -> Stream[Batch]:
    """The batches of all ranks in step: until none of them has a row left, or the stream of one ends.

    Each item's cursor is (its cursor, the greatest of what `word()` gave on any rank before it): all ranks see the same.

    Raises:
        Stopped: on all ranks, by the signal that `word()` gave on one whose stream it has ended.
    """
    stream = source(cursor)
    if gang.alone:
        yield from ((batch, (position, word())) for batch, position in stream)
        return
    entry = next(stream, None)
    while True:
        rows = entry is not None and bool(entry[0].mask.any())
        said = torch.tensor([rows, word(), entry is None], dtype=torch.int64)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=gang.control, async_op=True)
        following = None if entry is None else next(stream, None)
        assert work is not None
        work.wait()
        rows, heard, ended = said.tolist()
        if ended and heard:
            raise Stopped(Signal(heard))
        if ended or not rows:
            return
        assert entry is not None
        yield entry[0], (entry[1], heard)
        entry = following


def world_size() -> int:
    """The number of processes, after those that Slurm has started are given torch's names for what they are."""
    here = launched()
    if here.port:
        export(here)
    return here.size
