"""Ranks of a gang over gloo, each in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from fnrecipe import tree
from fnrecipe.compiler.torch_versions import inductor_takes_gathers
from fnrecipe.config import GangSection
from fnrecipe.models import llama
from fnrecipe.parallel.mesh import Axis, Mesh, global_slice, is_shard
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from fnrecipe.tree import Tree

T = TypeVar("T")

compiles_gathers = pytest.mark.skipif(not inductor_takes_gathers(), reason="torch compiles all-gathers from 2.13 on")
PRELOADED = ("tests.ranks", "torch._dynamo", "fnrecipe.models.llama.model", "fnrecipe.step", "fnrecipe.transforms", "pytest")
multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED])


def on_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """`function(rank, size, *args)` in `size` processes that can talk to each other; what one of them raises is raised here.

    They are forked from a process that has imported all they need, which takes seconds, and has started no thread.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    multiprocessing.start_processes(_joined, (size, port, function, args), nprocs=size, start_method="forkserver")


def _joined(rank: int, size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    function(rank, size, *args)
    dist.barrier()
    dist.destroy_process_group()


def computed_once(rank: int, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `function` returns on rank 0, on all ranks: the others, which share its cores, do not compute the same."""
    found: list[Any] = [function(*args, **options) if rank == 0 else None]
    dist.broadcast_object_list(found)
    result: T = found[0]
    return result


def world(rank: int, size: int, **changes: Any) -> Axis:
    """The axis of all ranks."""
    assert dist.group.WORLD is not None
    return Axis("shard", size, rank, dist.group.WORLD.group_name, **changes)


def mesh_of(rank: int, size: int, **config: Any) -> Mesh:
    return make_mesh(GangSection(**config), Gang(rank, size), torch.device("cpu"), llama.rules(llama.LlamaConfig()))


def assembled(size: int, value: Tree) -> dict[str, Tensor]:
    """The whole tensors of which the ranks have parts, by path, from what all of them send."""
    mine = {path: (global_slice(leaf), tree.leaves(leaf)[0]) for path, leaf in tree.paths(value, is_shard).items()}
    all_of_them: list[Any] = [None] * size
    dist.all_gather_object(all_of_them, mine)
    whole = {path: torch.empty(shape, dtype=local.dtype) for path, ((shape, _), local) in mine.items()}
    for theirs in all_of_them:
        for path, ((_, ranges), local) in theirs.items():
            whole[path][tuple(slice(start, stop) for start, stop in ranges)] = local
    return whole
