"""The gang: the processes of a run, as their launcher started them, and what their shells tell each other.

They speak JSON over gloo: nothing is unpickled, and the device is not waited for. The step's own collectives go over the axes
of a mesh (`fnrecipe.parallel.mesh`), in `fnrecipe.transforms.gradients`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fnrecipe.errors import LostError, UsageError
from fnrecipe.runtime.launcher import export, launched, meeting


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
        raise LostError(f"the processes of the run did not find each other: {on_one_line(error)}") from error
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


def all_gather_objects(gang: Gang, value: Any) -> list[Any]:
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


def on_one_line(error: BaseException) -> str:
    """The text of an error of torch, without its line ends."""
    return " ".join(str(error).split())


def check_same(gang: Gang, facts: Mapping[str, Any]) -> None:
    """Whether all ranks hold the same facts.

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
    """The number of processes, after those that Slurm has started are given torch's names for what they are."""
    here = launched()
    if here.port:
        export(here)
    return here.size
