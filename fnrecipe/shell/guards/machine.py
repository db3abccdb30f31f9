"""Silent errors of the machine: copies of the state are compared over ranks, and steps are computed twice."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import MachineError, few
from fnrecipe.observe import Ticks
from fnrecipe.parallel.fingerprint import fingerprint
from fnrecipe.parallel.mesh import global_slice, is_shard
from fnrecipe.recipe import Write
from fnrecipe.runtime.gang import Gang, all_gather_objects
from fnrecipe.step import Metrics, State, Step
from fnrecipe.tree import Tree

_NUMBER = 1 << 53  # what any reader of JSON takes exactly


def compared(ticks: Ticks, *, every: int | None, gang: Gang, write: Write) -> Ticks:
    """Records the hash of the state every `every` steps; compares what several ranks hold of it then, and before a save.

    Raises:
        MachineError: naming the ranks that hold something else than other copies.
    """
    for tick in ticks:
        due = every is not None and tick.metrics is not None and tick.number % every == 0
        if due or (every is not None and tick.save):
            number = hash_of(tick.state, f"step {tick.number}", gang)
            if due:
                write("hashes", [{"step": tick.number, "hashes/state": number}])
        yield tick


def hash_of(state: Tree, name: str, gang: Gang) -> int:
    """The hash of a state, called `name`: the same number at any number of ranks and under any sharding.

    Raises:
        MachineError: if copies differ.
    """
    leaves = {path: leaf for path, leaf in tree.paths(state, is_shard).items() if tree.leaves(leaf)[0].numel()}
    sums = torch.stack([fingerprint(path, leaf) for path, leaf in leaves.items()]).tolist()
    ranges = [global_slice(leaf)[1] for leaf in leaves.values()]
    mine = [[path, where, found] for path, where, found in zip(leaves, ranges, sums, strict=True)]
    hosts, everyone = zip(*all_gather_objects(gang, (socket.gethostname(), mine)), strict=True)
    copies: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(everyone):
        for path, where, found in theirs:
            copies[path, str([tuple(pair) for pair in where])][found].append(rank)
    _check_copies(copies, name, hosts)
    return sum(found for by_hash in copies.values() for found in by_hash) % _NUMBER


def _check_copies(copies: Mapping[tuple[str, str], Mapping[int, Sequence[int]]], name: str, hosts: Sequence[str]) -> None:
    """Raises MachineError for copies that differ, naming those that are fewer; all of them if none are."""
    wrong: dict[int, list[str]] = defaultdict(list)
    for (path, _), by_hash in copies.items():
        most = max(map(len, by_hash.values()))
        right = [ranks for ranks in by_hash.values() if len(ranks) == most]
        for ranks in by_hash.values() if len(by_hash) > 1 else ():
            for rank in ranks if ranks not in right or len(right) > 1 else ():
                wrong[rank].append(path)
    if wrong:
        liars = " or ".join(f"rank {rank} ({hosts[rank]})" for rank in sorted(wrong))
        paths = few(list(dict.fromkeys(path for found in wrong.values() for path in found)), 3)
        expected = "expected the same numbers on all ranks that hold a copy of them, found others"
        what = "its memory or its chip is faulty, and nothing that was saved is of this step"
        raise MachineError(f"{name}: {expected} on {liars}, in {paths}; {what} (regime.hash_every_n_steps)")


def recomputed(step: Step, every: int | None, first: int, gang: Gang) -> Step:
    """`step`, which computes every `every`-th step twice, and compares; `first` steps have been taken.

    Raises:
        MachineError: naming the ranks on which the two results differ.
    """
    if every is None:
        return step
    numbers = count(first + 1)

    def call(state: State, batch: Tree) -> tuple[State, Metrics]:
        number = next(numbers)
        return _twice(step, state, batch, number, gang) if number % every == 0 else step(state, batch)

    return call


def _twice(step: Step, state: State, batch: Tree, number: int, gang: Gang) -> tuple[State, Metrics]:
    # The second time begins in the buffers in which the first one ended, into which the old values are copied back: a step
    # that donates its state has no others, and a CUDA graph reads those alone.
    before = [leaf.clone() for leaf in tree.leaves(state)]
    state, metrics = step(state, batch)
    once = {path: leaf.clone() for path, leaf in tree.paths((state, metrics)).items()}
    for buffer, value in zip(tree.leaves(state), before, strict=True):
        buffer.copy_(value)
    state, metrics = step(state, batch)
    again = tree.paths((state, metrics))
    found = all_gather_objects(gang, [path for path, leaf in again.items() if not _same_bits(leaf, once[path])])
    wrong = [rank for rank, paths in enumerate(found) if paths]
    if wrong:
        ranks, paths = ", ".join(f"rank {rank}" for rank in wrong), few(found[wrong[0]], 3)
        advice = "its chip is faulty, or a kernel adds in another order each time (on a GPU: common.torch.deterministic=true)"
        raise MachineError(
            f"step {number}: expected the same bits of both computations, found others on {ranks}, in {paths}; {advice}"
        )
    return state, metrics


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
