"""The gang: the processes of a run, and the exchange of small values between their shells.

The shells exchange JSON over gloo: nothing is unpickled, and no host synchronises with its device. The step's own collectives
run along the axes of a mesh (`fnrecipe.parallel.mesh`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import attrs
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from fnrecipe.errors import LostError, UsageError
from fnrecipe.runtime.launcher import export, launched, meeting

T = TypeVar("T")


@attrs.frozen(eq=False)
class Gang:
    """This process as a member of the gang.

    rank, size   its rank, and the number of processes
    control      the gloo process group of the shells; None for a gang of one
    store        where ranks leave their last words; None for a gang of one
    """

    rank: int = 0
    size: int = 1
    control: ProcessGroup | None = None
    store: Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what only one process writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


@contextmanager
def joined(device: torch.device, minutes: float) -> Iterator[Gang]:
    """Joins the gang that the environment describes, and leaves it with the context; a gang of one if it describes none.

    Raises:
        LostError: if the others do not join within `minutes`.
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
        raise LostError(f"the processes of the run did not find each other: {on_one_line(error)}") from error
    try:
        yield Gang(rank, size, control, store)
    finally:
        dist.destroy_process_group()


def apart(gang: Gang, minutes: float) -> Gang:
    """The same gang with a process group of its own, for exchanges beside those of `gang`; all ranks make it together.

    An exchange fails after `minutes`.
    """
    if gang.alone:
        return gang
    return attrs.evolve(gang, control=dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes)))


def _store(size: int, timeout: timedelta) -> Store:
    """The store that all ranks share: a file for those that `--nproc` started, else a server at MASTER_ADDR."""
    directory = meeting()
    if directory is not None:
        store: Store = dist.FileStore(str(directory / "store"), size)
        return store
    store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 has begun a new one
        return store
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]  # so that no rank finds the address of an earlier attempt
    return PrefixStore(f"attempt {attempt}", store)


def all_gather_objects(gang: Gang, value: T) -> list[T]:
    """All-gather of a JSON value: those of all ranks, by rank. Tuples arrive as lists."""
    if gang.alone:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(gang.size)]
    dist.all_gather(sizes, torch.tensor(len(mine)), group=gang.control)
    longest = max(int(size) for size in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=gang.control)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def on_one_line(error: BaseException) -> str:
    """The message of an error of torch, on one line."""
    return " ".join(str(error).split())


def check_same(gang: Gang, facts: Mapping[str, object]) -> None:
    """Checks that all ranks have the same facts.

    Raises:
        UsageError: naming the first rank that differs from rank 0, and in what.
    """
    first, *others = all_gather_objects(gang, dict(facts))
    for rank, other in enumerate(others, 1):
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if names:
            lines = [f"  {name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}" for name in names[:10]]
            raise UsageError("\n".join([f"rank {rank}: expected what rank 0 has, found a difference", *lines]))


def world_size() -> int:
    """The number of processes; sets torch's variables in a process that Slurm started."""
    here = launched()
    if here.port:
        export(here)
    return here.size
