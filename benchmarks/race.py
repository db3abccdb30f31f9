"""Optimizers side by side: the same small Llama on the same rows, each at the best of its learning rates.

The recipe `lm` on Python's library, bytes, one thread, `STEPS` steps. For each optimizer the rate is doubled and halved from
where it begins until the best one stands between two worse ones, by the validation loss of the first seed; then the other seeds
train at it. All else is a default but decay, 0.1 for all, and the schedule of `schedule_free`, which has no end; that is
evaluated at its mean. Optimizers take turns, so that a little time is shared by all; `--keep FILE` has the runs that are done,
and the same command goes on behind them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.report import Result
from fnrecipe.build import batches, evaluation_batches, init_train_state, make_step, to_device
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.fold import fold
from fnrecipe.inspect.chart import Chart, Line, svg
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import Evaluation
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.data import valid_stream
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime import host
from fnrecipe.step import shown
from fnrecipe.transforms import evaluation
from fnrecipe.tree import Tree

STEPS, SEEDS, VALID, SMOOTHED, BASE = 120, (1, 2), 16, 10, "adamw"
MODELS = {
    "0.8M": (
        "model.config={vocab_size: 264, max_seq_len: 128, model_dim: 128, num_layers: 4, num_attn_heads: 4, "
        "num_key_value_heads: 2, ffn_inner_dim: 344, tied_embeddings: true}",
        "dataset.max_seq_len=128",
    ),
    "3M": (),
}
_MUON = ("optimizer.config.scale=match_rms", "optimizer.config.adamw.lr={rate}")
ENTRIES: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "adamw": (4e-3, ()),
    "muon": (4e-3, _MUON),
    "normuon": (4e-3, _MUON),
    "soap": (4e-3, ()),
    "lion": (1e-3, ()),
    "ademamix": (4e-3, ()),
    "mars": (4e-3, ()),
    "schedule_free": (8e-3, ("lr_scheduler.name=constant",)),
    "adafactor": (1.6e-2, ()),
}
"""By name: the rate to begin with, and what else the config says. (Muon at AdamW's size of update, so they have one rate.)"""
DEVICE = torch.device("cpu")


@attrs.frozen
class Run:
    """The rate is `2 ** doublings` times the first; `losses` of each step, `valid` at the end, `cpu` seconds of a step."""

    model: str
    optimizer: str
    doublings: int
    seed: int
    losses: tuple[float, ...]
    valid: float
    cpu: float

    @property
    def rate(self) -> float:
        return ENTRIES[self.optimizer][0] * 2.0**self.doublings


@attrs.frozen
class Job:
    model: str
    optimizer: str
    doublings: int
    seed: int


def run(
    rounds: int, minutes: float = 25.0, keep: Path | None = None, picture: Path | None = None, models: Sequence[str] = ()
) -> list[Result]:
    """`minutes` of runs at most; `rounds` counts for nothing: what is noisy here are seeds."""
    end, results = time.monotonic() + 60 * minutes, list[Result]()
    torch.set_num_threads(1)
    host.keep_freed_memory()
    for model in models or ["0.8M"]:
        done = [each for each in _read(keep) if each.model == model]
        while (jobs := list(_open(model, done))) and time.monotonic() < end:
            job = min(jobs, key=lambda job: sum(each.optimizer == job.optimizer for each in done))
            done.append(_train(job))
            print(f"{job.model} {job.optimizer} {done[-1].rate:.2g} seed {job.seed}: {done[-1].valid:.4f}", flush=True)
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps(attrs.asdict(done[-1])) + "\n")
        results += _results(model, done)
        if picture is not None and done:
            picture.write_text(_picture(model, done))
    return results


def next_doublings(tried: Mapping[int, float]) -> int | None:
    """What to try next, of losses by doublings: a neighbour of the best; None if both were tried. (Where all diverge, less.)"""
    best = min(tried, key=lambda each: (_finite(tried[each]), each), default=0)
    return next((each for each in (best, best + 1, best - 1) if each not in tried), None)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _open(model: str, done: Sequence[Run]) -> Iterator[Job]:
    """For each optimizer the run to be made next, if there is one."""
    for name in ENTRIES:
        found = {(each.doublings, each.seed): each.valid for each in done if each.optimizer == name}
        tried = {doublings: loss for (doublings, seed), loss in found.items() if seed == SEEDS[0]}
        near = next_doublings(tried)
        if near is not None:
            yield Job(model, name, near, SEEDS[0])
            continue
        best = min(tried, key=lambda each: _finite(tried[each]))
        for seed in SEEDS[1:]:
            if (best, seed) not in found:
                yield Job(model, name, best, seed)


def config_of(job: Job) -> LMConfig:
    first, changes = ENTRIES[job.optimizer]
    rate = first * 2.0**job.doublings
    pairs = [
        *MODELS[job.model],
        "gang.device=cpu",
        "gang.num_microbatches=1",
        f"regime.num_steps={STEPS}",
        f"common.seed={job.seed}",
        f"optimizer.name={job.optimizer}",
        f"optimizer.config.lr={rate}",
        "optimizer.config.weight_decay=0.1",
        *(each.format(rate=rate) for each in changes),
    ]
    config: LMConfig = resolve(recipe.config, (), pairs)[0]
    return config


def _train(job: Job) -> Run:
    config, mesh = config_of(job), Mesh()
    step = make_step(recipe, config, mesh, DEVICE)
    state = init_train_state(recipe, config, mesh, DEVICE)
    losses, times = list[float](), [time.process_time()]
    for state, metrics, _ in fold(step, state, ((batch, None) for batch in _rows(job.model, job.seed))):  # noqa: B007
        losses.append((metrics["loss"] / metrics["targets"]).item())
        times.append(time.process_time())
    spent = (times[-1] - times[1]) / (STEPS - 1)  # the first step traces
    valid = _validate(config, shown(recipe.update(config), state))
    return Run(job.model, job.optimizer, job.doublings, job.seed, tuple(losses), valid, spent)


@cache
def _rows(model: str, seed: int) -> list[Tree]:
    """The batches of all optimizers."""
    config = config_of(Job(model, BASE, 0, seed))
    stream = batches(recipe, config, LaneAssignment(), DEVICE)(None)
    return [to_device(batch, DEVICE) for batch, _ in islice(stream, STEPS)]


def _validate(config: LMConfig, params: Tree) -> float:
    sums = evaluation(recipe.loss(config), 1)
    stream = evaluation_batches(recipe, "valid", Evaluation(valid_stream), config, LaneAssignment(), DEVICE)(None)
    found = [sums(params, to_device(batch, DEVICE)) for batch, _ in islice(stream, VALID)]
    return sum(each["loss"].item() for each in found) / sum(each["targets"].item() for each in found)


def _read(keep: Path | None) -> list[Run]:
    if keep is None or not keep.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in keep.read_text().splitlines()]
    return [Run(**{**row, "losses": tuple(row["losses"])}) for row in rows]


def _best(done: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each optimizer at its best rate, one for each seed; the best optimizer first."""
    found = dict[str, list[Run]]()
    for name in ENTRIES:
        first = [each for each in done if each.optimizer == name and each.seed == SEEDS[0]]
        if first:
            best = min(first, key=lambda each: _finite(each.valid))
            found[name] = [each for each in done if each.optimizer == name and each.doublings == best.doublings]
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(each.valid for each in item[1])))


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and of those before it, `SMOOTHED` at most."""
    return [statistics.fmean(losses[max(0, end - SMOOTHED) : end]) for end in range(1, len(losses) + 1)]


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """The first step whose smoothed loss is at most the target."""
    return next((number for number, loss in enumerate(smoothed(losses), 1) if loss <= target), None)


def _results(model: str, done: Sequence[Run]) -> list[Result]:
    best, results = _best(done), list[Result]()
    targets = {each.seed: smoothed(each.losses)[-1] for each in best.get(BASE, ())}
    for name, runs in best.items():
        tried = len({each.doublings for each in done if each.optimizer == name})
        known = [(each, steps_to(each.losses, targets[each.seed])) for each in runs if each.seed in targets]
        reached = [(each, steps) for each, steps in known if steps is not None]
        rows: list[tuple[str, list[float], str]] = [
            (f"learning rate, of {tried}", [runs[0].rate], ""),
            ("validation loss", [each.valid for each in runs], "nats"),
            (f"steps to {BASE}'s last training loss", [steps for _, steps in reached], "steps"),
            ("CPU seconds to it", [steps * each.cpu for each, steps in reached], "s"),
            ("CPU seconds a step", [each.cpu for each in runs], "s"),
        ]
        results += [Result("race", model, name, metric, values, unit) for metric, values, unit in rows]
    return results


def _picture(model: str, done: Sequence[Run]) -> str:
    """The smoothed loss of training, in the mean over seeds."""
    lines = []
    for name, runs in _best(done).items():
        mean = [statistics.fmean(each) for each in zip(*(smoothed(run.losses) for run in runs), strict=True)]
        lines.append(Line(f"{name} {runs[0].rate:.2g}", [(float(n), loss) for n, loss in enumerate(mean, 1) if n >= SMOOTHED]))
    return svg(Chart(lines=lines, x="step", y=f"training loss, {model}, mean of {SMOOTHED} steps"))
