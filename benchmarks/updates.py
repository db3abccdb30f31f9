"""The update alone of each optimizer, traced, as a share of a step of the default model: 8 rows of 256 bytes, one thread.

As a step makes it: the gradients' norm and mean, clipping, the check for numbers that are not finite, the new parameters and
state in place of the old ones. SOAP renews its bases in one of ten updates, which is one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import torch

from benchmarks.race import DEVICE, ENTRIES, Job, config_of
from benchmarks.report import Result
from fnrecipe import optim, random, tree
from fnrecipe.build import batches, init_train_state, to_device
from fnrecipe.data import LaneAssignment
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime import host
from fnrecipe.step import init_state
from fnrecipe.transforms import gradients, jit
from fnrecipe.tree import Tree

COUNT, BACKWARD = 10, "forward and backward"


def run(rounds: int) -> list[Result]:
    torch.set_num_threads(1)
    host.keep_freed_memory()
    configs = {name: config_of(Job("3M", name, 0, 1)) for name in ENTRIES}
    updates = {name: recipe.update(config) for name, config in configs.items()}
    updates["adamw, as a chain"] = attrs.evolve(updates["adamw"], fused_update=None)
    params = init_train_state(recipe, configs["adamw"], Mesh(), DEVICE).params
    work = {BACKWARD: _backward(params), **{name: _update(update, params) for name, update in updates.items()}}
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(1 + rounds):
        for name, call in work.items():
            began = time.process_time()
            for _ in range(COUNT):
                call()
            if number:
                spent[name].append((time.process_time() - began) / COUNT)
    results = [Result("updates", "3M", name, "CPU seconds", values, "s") for name, values in spent.items()]
    for name in updates:
        shares = [mine / (mine + rest) for mine, rest in zip(spent[name], spent[BACKWARD], strict=True)]
        results.append(Result("updates", "3M", name, "share of a step", shares, ""))
    return results


def _backward(params: Tree) -> Callable[[], object]:
    config = config_of(Job("3M", "adamw", 0, 1))
    batch, _ = next(batches(recipe, config, LaneAssignment(), DEVICE)(None))
    found = jit(gradients(recipe.loss(config), 1, Mesh()))
    on_device = to_device(batch, DEVICE)
    return lambda: found(params, on_device, random.key(0), ())


def _update(update: Transform, params: Tree) -> Callable[[], None]:
    """An update of a state of its own by the sines of the parameters."""
    total, accept = tree.map(torch.sin, params), torch.tensor(True)
    state = init_state(tree.map(torch.clone, params), update, random.key(0))

    def made(state: tuple[Tree, Tree, torch.Tensor], total: Tree) -> tuple[tuple[Tree, Tree, torch.Tensor], tuple[()]]:
        params, optimizer, step = state
        mean = optim.mean_gradient(total, torch.tensor(1.0))
        params, optimizer, _, _ = optim.guarded_update(update, mean, optimizer, params, step + 1, accept, random.key(0))
        return (params, optimizer, step + 1), ()

    step, now = jit(made, donate=1), (state.params, state.optimizer, state.step)

    def call() -> None:
        nonlocal now
        now, _ = step(now, total)

    return call
