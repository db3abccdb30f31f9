"""Some steps of a recipe under torch's profiler: where the time goes, and how much of it nothing runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar

import attrs
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from fnrecipe.build import batches, init_train_state, make_step, to_device
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.compiler.products import Kernel, Product
from fnrecipe.data import Cursor, Source, Stream, map_items, pipe, reading
from fnrecipe.data.stream import T
from fnrecipe.errors import UsageError
from fnrecipe.fold import fold
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.clock import record_event
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import lane_assignment, make_mesh
from fnrecipe.runtime.products import measured
from fnrecipe.shell.directory.lock import writing
from fnrecipe.shell.recording.throughput import Speed, speed, timed, work_of
from fnrecipe.step import Metrics

P = ParamSpec("P")
R = TypeVar("R")

TRACE, MEMORY = "trace.json", "memory.pickle"
WARM_UP = 3
"""Steps before anything is measured: the first one traces, the next ones fill caches and queues."""


@attrs.frozen
class Operation:
    """A kind of operation, or of kernel on a GPU: how often a step runs it, and seconds in it but not in its parts."""

    name: str
    calls: float
    seconds: float


@attrs.frozen
class Profile:
    """What was measured.

    speed       of steps without the profiler
    seconds     of a step under it: operations are slower there
    busy        share of these in which the device ran an operation
    operations  those that take most time first
    products    what computes each kind of large matrix product on a CPU
    """

    device: str
    speed: Speed
    seconds: float
    busy: float
    operations: tuple[Operation, ...]
    products: Mapping[Product, Kernel]


def profile(recipe: Recipe[C], config: C, out: Path, steps: int) -> Profile:
    """Measures `steps` steps of `recipe` in this process, and as many more under the profiler; after steps to warm up.

    Writes a Chrome trace into the directory `out`, and on CUDA a snapshot of the memory for https://pytorch.org/memory_viz.

    Raises:
        UsageError: if the data does not last, `out` cannot be written to, or the config needs several processes.
    """
    with writing(out):
        for name in (TRACE, MEMORY):
            (out / name).unlink(missing_ok=True)
    device = host.pick_device(config.gang.device)
    host.prepare(config.common.torch, jit_mode(config.trainer.jit, device))
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # nothing below errors: it tells of its start and stop
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    products = dict[Product, Kernel]()
    step = make_step(recipe, config, mesh, device, choose=partial(_kept, products))
    read = batches(recipe, config, lane_assignment(mesh, config.gang.num_microbatches), device)
    read = pipe(read, _annotated, timed, partial(map_items, function=partial(to_device, device=device)))
    with reading(read(None)) as stream:
        folded = fold(_named("step", step), init_train_state(recipe, config, mesh, device), stream)
        run = partial(_run, ((metrics, position.waited) for _, metrics, position in folded), device=device)
        run(WARM_UP)
        waits, targets, seconds = run(steps)
        # There is one cycle, so nothing accumulates; without `acc_events` torch 2.11 warns of that.
        with _remembered(device, out / MEMORY), profiler(activities=_activities(device), acc_events=True) as found:
            _, _, slower = run(steps)
    with writing(out):
        found.export_chrome_trace(str(out / TRACE))
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    intervals = [(e.time_range.start, e.time_range.end) for e in found.events() or () if _counts(e, kind)]
    measured = speed(work_of(recipe, config, device, 1), targets, waits, seconds)
    operations = _operations([e for e in found.key_averages() if _counts(e, kind)], kind, steps)
    return Profile(host.device_name(device), measured, slower / steps, covered(intervals) * 1e-6 / slower, operations, products)


def _kept(chosen: dict[Product, Kernel], products: Collection[Product]) -> Mapping[Product, Kernel]:
    """What is measured to be fastest, which is added to `chosen`."""
    chosen |= measured(products)
    return chosen


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    length, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        length += max(0.0, last - max(first, end))
        end = max(end, last)
    return length


def _run(
    folded: Iterator[tuple[Metrics, float]], steps: int, *, device: torch.device
) -> tuple[list[float], list[float], float]:
    """So many steps: seconds that each waited for data, its targets, and seconds of all of them."""
    began = record_event(device)
    began.wait()
    done = list(islice(folded, steps))
    seconds = record_event(device).since(began)
    if len(done) < steps:
        raise UsageError("dataset: expected a batch for each step of the profile, found fewer; take less --steps or more data")
    return [waited for _, waited in done], [metrics["targets"].item() for metrics, _ in done], seconds


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


@contextmanager
def _remembered(device: torch.device, path: Path) -> Iterator[None]:
    """Writes what was allocated within the context, and where, if the device is a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _named(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """The function, as an interval of that name in the trace."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def _annotated(source: Source[T], cursor: Cursor = None) -> Stream[T]:
    """The same stream; the waits for it have a name in the trace."""
    following = _named("wait for data", partial(next, source(cursor), None))
    while (entry := following()) is not None:
        yield entry


def _counts(event: FunctionEvent | FunctionEventAvg, kind: DeviceType) -> bool:
    """Whether an event of the profiler is an operation of the device, and not a name that we gave to an interval."""
    return event.device_type == kind and not event.is_user_annotation


def _operations(averages: Sequence[FunctionEventAvg], kind: DeviceType, steps: int) -> tuple[Operation, ...]:
    name = "self_device_time_total" if kind == DeviceType.CUDA else "self_cpu_time_total"
    found = [Operation(str(e.key), e.count / steps, getattr(e, name) * 1e-6 / steps) for e in averages]
    return tuple(sorted(found, key=lambda operation: -operation.seconds))
