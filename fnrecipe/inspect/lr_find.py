"""A sweep of the learning rate: a recipe's own step is folded over its own stream at a rate that grows, and nothing is kept.

(Smith 2015, arXiv:1506.01186, who calls it the learning rate range test.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean

import attrs

from fnrecipe import checkpoint
from fnrecipe.build import batches, init_train_state, make_step, to_device
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.components.lr_schedulers.exponential import ExponentialConfig
from fnrecipe.config import LRSchedulerSection, OptimizerSection
from fnrecipe.data import map_items, pipe, reading
from fnrecipe.errors import UsageError
from fnrecipe.fold import fold
from fnrecipe.inspect.chart import Chart, Line, svg
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import lane_assignment, make_mesh
from fnrecipe.runtime.products import measured
from fnrecipe.shell.directory.lock import writing
from fnrecipe.shell.streams import resumed
from fnrecipe.step import Metrics

DIVERGED = 4.0
"""A mean loss that is so many times the lowest one before it ends a sweep."""
TABLE, PICTURE = "lr_find.csv", "lr_find.svg"


@attrs.frozen
class Sweep:
    """The learning rates of steps, and the loss before the update at each.

    window    how many losses are in a mean: of `smoothed`, around each step
    diverged  whether it ended before its last step
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    window: int
    diverged: bool

    @property
    def smoothed(self) -> tuple[float, ...]:
        half = self.window // 2
        return tuple(fmean(self.losses[max(0, each - half) : each + half + 1]) for each in range(len(self.losses)))

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is least: at greater ones it grows."""
        return self.rates[_least(self.smoothed)]

    @property
    def steepest(self) -> float:
        """The rate, of those before `lowest`, at which the smoothed loss falls most for the same factor."""
        smoothed = self.smoothed[: max(_least(self.smoothed), 2) + 1]
        falls = [after - before for before, after in zip(smoothed, smoothed[2:], strict=False)]
        return self.rates[1 + _least(falls)]


def _least(values: Iterable[float]) -> int:
    return min(enumerate(values), key=lambda pair: pair[1])[0]


def lr_find(
    recipe: Recipe[C], config: C, rates: tuple[float, float], *, steps: int, window: int = 5, begin: Checkpoint | None = None
) -> Sweep:
    """Trains `recipe` for `steps` steps from the first of `rates` to the second, each the same factor above the one before.

    It begins with the state and the cursor of a checkpoint, or as a run begins. It ends before its last step where the loss or
    the update is not finite, and where the mean of the last `window` losses is `DIVERGED` times the lowest such mean.

    Raises:
        UsageError: if the recipe's rate is not that of its config, the data does not last, or three steps already diverge.
        CheckpointError: if the checkpoint is not one of that recipe under that config.
    """
    device = host.pick_device(config.gang.device)
    host.prepare(config.common.torch, jit_mode(config.trainer.jit, device))
    config = _growing(recipe, config, rates, first_step=1 + (begin.step if begin else 0), steps=steps)
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    step = make_step(recipe, config, mesh, device, choose=measured)
    state = init_train_state(recipe, config, mesh, device, pretrained=begin is None)
    if begin is not None:
        state = checkpoint.restore(begin, state)
    read = batches(recipe, config, lane_assignment(mesh, config.gang.num_microbatches), device)
    read = pipe(read, resumed, partial(map_items, function=partial(to_device, device=device)))
    wanted = [rates[0] * (rates[1] / rates[0]) ** (number / (steps - 1)) for number in range(steps)]
    with reading(read(begin.cursor if begin else None)) as stream:
        pairs = zip(wanted, (metrics for _, metrics, _ in fold(step, state, stream)), strict=False)
        found = _until_divergence(recipe.name, pairs, window)
    if len(found.losses) < 3 and found.diverged:
        raise UsageError(f"--start: expected a rate at which {recipe.name} can be trained, found divergence at {rates[0]:g}")
    if len(found.losses) < steps and not found.diverged:
        expected = f"expected a batch for each of {steps:,} steps, found {len(found.losses):,}"
        raise UsageError(f"dataset: {expected}; take less --steps or more data")
    return found


def _growing(recipe: Recipe[C], config: C, rates: tuple[float, float], *, first_step: int, steps: int) -> C:
    """The config with a schedule that has the rates at the first step and at the last."""
    lr = peak(recipe, config)
    first, last = (rate / lr for rate in rates)
    grows = ExponentialConfig(first, last, first_step, first_step + steps - 1)
    changed: C = attrs.evolve(config, lr_scheduler=LRSchedulerSection("exponential", grows))  # type: ignore[misc]
    return changed


def peak(recipe: Recipe[C], config: C) -> float:
    """The learning rate that a config says.

    Raises:
        UsageError: if it says none, or 0.
    """
    for name, kind in (("optimizer", OptimizerSection), ("lr_scheduler", LRSchedulerSection)):
        if not isinstance(getattr(config, name, None), kind):
            expected = "a recipe whose update is that of the sections optimizer and lr_scheduler"
            raise UsageError(f"{recipe.name}: expected {expected}, found no {name} in its config")
    lr = getattr(config.optimizer.config, "lr", None)  # type: ignore[attr-defined]
    if not lr:
        raise UsageError(f"optimizer.config.lr: expected a number above 0, found {'none' if lr is None else lr}")
    return float(lr)


def _until_divergence(name: str, pairs: Iterable[tuple[float, Metrics]], window: int) -> Sweep:
    rates, losses, lowest = list[float](), list[float](), math.inf
    for rate, metrics in pairs:
        if "lr" in metrics and not math.isclose(metrics["lr"].item(), rate, rel_tol=1e-6):
            expected = f"a rate as lr_scheduler says it, {rate:.3g}"
            raise UsageError(f"{name}.update: expected {expected}, found {metrics['lr'].item():.3g}")
        loss = (metrics["loss"] / metrics["targets"]).item()
        if math.isfinite(loss):
            rates, losses = [*rates, rate], [*losses, loss]
            lowest = min(lowest, fmean(losses[-window:]))
        if not math.isfinite(loss) or metrics["skipped"].item() or fmean(losses[-window:]) > DIVERGED * lowest:
            return Sweep(tuple(rates), tuple(losses), window, diverged=True)
    return Sweep(tuple(rates), tuple(losses), window, diverged=False)


def write(found: Sweep, out: Path) -> None:
    """The sweep as a table and a picture in the directory `out`.

    Raises:
        UsageError: if they cannot be written.
    """
    rows = zip(found.rates, found.losses, found.smoothed, strict=True)
    table = ["lr,loss,smoothed", *(",".join(map(repr, row)) for row in rows)]
    lines = [
        Line("loss", list(zip(found.rates, found.losses, strict=True))),
        Line(f"mean of {found.window}", list(zip(found.rates, found.smoothed, strict=True))),
    ]
    marks = {f"steepest, {found.steepest:.2g}": found.steepest, f"lowest, {found.lowest:.2g}": found.lowest}
    picture = svg(Chart(lines=lines, x="learning rate", y="loss", log_x=True, marks=marks))
    with writing(out):
        (out / TABLE).write_text("\n".join([*table, ""]), encoding="utf-8")
        (out / PICTURE).write_text(picture, encoding="utf-8")
