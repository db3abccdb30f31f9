"""Updates of whole matrices over ranks of gloo: each matrix on one rank, beside each matrix on every rank.

The update alone, traced, of the matrices inside of four layers of width 256, one thread a rank. CPU seconds and traffic are
those of all ranks; `computed` are the matrices whose direction the busiest rank computes; `state` is what rank 0 keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import torch

from benchmarks.cases import llama_config
from benchmarks.gang import measured, on_ranks
from benchmarks.report import Result, ratios
from fnrecipe import optim, random, tree
from fnrecipe.config import GangSection
from fnrecipe.models import llama
from fnrecipe.optim import Transform
from fnrecipe.parallel.deal import deal
from fnrecipe.parallel.mesh import Mesh, Shard, is_shard, outline
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree

MODEL, STEPS = llama_config(256, 256, 256, 4, 4, 4, 688, tied=True), 4
ONCE, EVERYWHERE = "once", "on every rank"
DIRECTIONS = {
    "muon": (optim.momentum(0.95, nesterov=True, average=True), optim.orthogonalize()),
    "soap": (optim.scale_by_soap(every=4),),
}
UNITS = {"CPU seconds a step": "s", "seconds a step": "s", "traffic a step": "MB", "computed": "matrices", "state": "MB"}


def run(rounds: int) -> list[Result]:
    results = []
    for size in (2, 4):
        for sharding in ("replicate", "fsdp"):
            for name in ("muon", "soap"):
                found = on_ranks(size, _take_turns, name, sharding, rounds)
                case = f"{name}, {sharding}, {size} ranks"
                results += [
                    Result("optimizers", case, system, metric, values, UNITS[metric])
                    for system, metrics in found.items()
                    for metric, values in metrics.items()
                ]
    return results + ratios(results, "CPU seconds a step", EVERYWHERE)


def _take_turns(rank: int, size: int, name: str, sharding: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    host.keep_freed_memory()
    mesh = make_mesh(GangSection(sharding=sharding), Gang(rank, size), torch.device("cpu"), llama.rules(MODEL))
    work: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for system in (ONCE, EVERYWHERE):
        work[system], found[system] = _updates(name, system, mesh)
    for number in range(1 + rounds):
        for system, steps in work.items():
            for metric, value in measured(steps).items() if number else ():
                found[system].setdefault(metric, []).append(value / STEPS)
    return found


def _updates(name: str, system: str, mesh: Mesh) -> tuple[Callable[[], None], dict[str, list[float]]]:
    """`STEPS` updates, and the figures that no clock tells."""
    params = _matrices(llama.init(MODEL, random.key(0), mesh.cut))
    transform = optim.chain(*DIRECTIONS[name] if system == ONCE else map(_everywhere, DIRECTIONS[name]))
    state, gradients = optim.init_parts(transform, params), tree.map(torch.sin, params)
    update = jit(transform.update)
    owners = Counter(tuple(hop.owner for hop in route) for route in deal(params).routes.values())
    computed = max(owners.values()) if system == ONCE else len(params)

    def steps() -> None:
        nonlocal state
        for step in range(STEPS):
            _, state, _ = update(gradients, state, params, torch.tensor(step + 1))

    return steps, {"computed": [computed], "state": [sum(leaf.nbytes for leaf in tree.leaves(state)) / 1e6]}


def _everywhere(transform: Transform) -> Transform:
    return attrs.evolve(transform, needs="everything") if transform.needs == "matrices" else transform


def _matrices(params: Tree) -> dict[str, Shard]:
    """Those inside of layers."""
    return {path: leaf for path, leaf in tree.paths(params, is_shard).items() if "layers" in path and outline(leaf).ndim == 2}
