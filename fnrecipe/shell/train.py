"""The shell around the fold: files, signals and the screen. `train` runs a recipe in a directory, or goes on with it there.

At a boundary the order is: publish metrics, save, validate. On CUDA metrics are written one publication late, so that the
device always has work; where it is waited for anyway, before a save, a validation and the end, all of them are. So what is
saved is never ahead of what is recorded. A validation that dies loses nothing: it is made up for when the run goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from signal import Signals as Signal
from typing import Any

import attrs
import torch

from fnrecipe import checkpoint, random, tree
from fnrecipe.build import init_train_state, make_step
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.config import unstructure, yaml
from fnrecipe.config.affects import runtime_paths
from fnrecipe.config.layers import flatten, values
from fnrecipe.data import Cursor, Source, joint, tell_left_out
from fnrecipe.data.survey import NO_ROW
from fnrecipe.errors import CheckpointError, FnrecipeError, NonFiniteError, UsageError
from fnrecipe.fold import fold
from fnrecipe.loss import Sums
from fnrecipe.parallel.mesh import Mesh, global_slice, is_shard
from fnrecipe.recipe import Recipe
from fnrecipe.runtime import host
from fnrecipe.runtime.clock import record_event
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.gang import Gang, all_gather_objects, check_same, joined, world_size
from fnrecipe.runtime.last_words import last_words
from fnrecipe.runtime.process_groups import axis_sizes, check_world_size, lane_assignment, make_mesh
from fnrecipe.runtime.signals import EXIT_STATUS, Signals, Stopped
from fnrecipe.runtime.transfer import PendingCopy, fetch, publication_delay
from fnrecipe.shell import record, run_dir
from fnrecipe.shell.display import Display, duration
from fnrecipe.shell.identity import TOKENIZER, identity
from fnrecipe.shell.metrics import means
from fnrecipe.shell.progress import with_progress
from fnrecipe.shell.streams import Rank, train_source, validation_source
from fnrecipe.shell.throughput import Clock, Work, work_of
from fnrecipe.shell.unread import warning, watch
from fnrecipe.step import Metrics, State, Step
from fnrecipe.transforms import unshard
from fnrecipe.tree import Tree


def train(recipe: Recipe[Any], config: Any, out: Path, *, with_changes: bool = False, started: float | None = None) -> int:
    """Trains `recipe` under `config` in the directory `out`, from its newest checkpoint if it has one.

    Returns the exit status: 0, or 130 / 143 / 129 / 0 after SIGINT / SIGTERM / SIGHUP / SIGUSR1 and a last checkpoint, if there
    was something to save. The time that the run is said to take counts from `started`, on the monotonic clock, or from now.

    Raises:
        FnrecipeError: with a message for the user, for all that can go wrong by the config, the data or the machine.
    """
    try:
        return _train(recipe, config, out, with_changes, time.monotonic() if started is None else started)
    except Stopped as stopped:
        return EXIT_STATUS[stopped.number]


def _train(recipe: Recipe[Any], config: Any, out: Path, with_changes: bool, started: float) -> int:
    given, reads = recipe, set[str]()
    recipe = watch(given, reads)
    replicas, shards, _ = axis_sizes(config.gang, world_size())
    parts = {"gang.num_microbatches": config.gang.num_microbatches, "dataset.num_lanes": config.dataset.num_lanes}
    check_world_size(parts, replicas * shards)
    device = host.pick_device(config.gang.device)
    with joined(device, config.gang.timeout) as gang, last_words(gang), ExitStack() as stack:
        parting = partial(_parting, out, gang)
        signals = stack.enter_context(Signals(parting, at_once=gang.alone, once=not gang.alone))
        claim = stack.enter_context(run_dir.claimed(out)) if gang.leads else None
        if claim is not None and not with_changes:
            run_dir.check_config(out, unstructure(config), set(runtime_paths(config)))
        corpora = recipe.corpora(config) if recipe.corpora else []
        facts = identity(recipe, config, corpora)
        check_same(gang, {**values(flatten(unstructure(config), "")), **host.versions(), **facts})
        with run_dir.writing(out):
            display = Display(out / run_dir.log(gang.rank), config.regime.num_steps, quiet=not gang.leads)
        stack.enter_context(display)
        host.prepare(config.common.torch.num_threads, jit_mode(config.trainer.jit, device))
        tell_left_out(corpora if gang.leads else [])
        mesh = make_mesh(config.gang, gang, device, recipe.rules)
        telling = partial(with_progress, tell=display.line, waiting=display.waiting)
        step, evaluate = make_step(recipe, config, mesh, device, telling)
        work = work_of(recipe, config, device, gang.size)
        stack.callback(host.unfreeze_objects)
        try:
            shell = gang, mesh, signals, display, started
            unread = partial(warning, given, config, reads)
            return _Run(recipe, config, out, claim, with_changes, facts, device, *shell, step, evaluate, work, unread).go()
        except OSError as error:  # a full disk, say; what is saved is untouched
            raise FnrecipeError(f"{error.filename or out}: {error.strerror or error}") from error
        except (MemoryError, RuntimeError) as error:
            if message := host.out_of_memory(error):
                raise FnrecipeError(message) from error
            raise


@attrs.frozen
class _Publication:
    """Some steps: their metrics, on their way; seconds that each waited for data; and the clock that ran during them."""

    metrics: PendingCopy
    waits: Sequence[float]
    clock: Clock


@attrs.frozen
class _Run:
    """What stays the same from the first step of a process to its last."""

    recipe: Recipe[Any]
    config: Any
    _out: Path
    claim: int | None
    with_changes: bool
    facts: Mapping[str, str]
    device: torch.device
    gang: Gang
    mesh: Mesh
    signals: Signals
    display: Display
    started: float
    step: Step
    evaluate: Callable[[Tree, Tree], Sums]
    work: Work
    unread: Callable[[], str]

    @property
    def out(self) -> Path:
        """The output directory; it is still the one that was claimed whenever something is about to be read or written."""
        if self.claim is not None:
            run_dir.check_claim(self._out, self.claim)
        return self._out

    def go(self) -> int:
        """The fold, observed."""
        regime = self.config.regime
        state, start, first = self._start()
        cursor = start
        if self.gang.leads:
            self._write_down()
        if first and _due(regime.validate_every_n_steps, first):
            self._validate(state.params, first)
        stop = self._heard if first else None
        number = saved = first
        pending: list[tuple[Metrics, float]] = []
        late: deque[_Publication] = deque()
        clock = Clock(first, record_event(self.device))
        with closing(self._stream(cursor)) as stream:
            folded = fold(self.step, state, stream)
            left = None if regime.num_steps is None else max(regime.num_steps - first, 0)
            left = 0 if stop is not None else left
            if left != 0 and jit_mode(self.config.trainer.jit, self.device) != "off":
                self.display.line("tracing the step")
            self.signals.at_once = False  # from here on, a step is finished and saved first
            try:
                for number, (state, metrics, ((cursor, waited), heard)) in enumerate(islice(folded, left), first + 1):
                    pending.append((metrics, waited))
                    if number == first + 1:
                        if line := self.unread():
                            self.display.line(line)
                        self.display.line(f"first step after {duration(time.monotonic() - self.started)}")
                        host.freeze_objects()
                        clock = Clock(number, record_event(self.device))
                    stop = self._heard if self.gang.alone else Signal(heard) if heard else None
                    save = stop is not None or _due(regime.checkpoint_every_n_steps, number)
                    validate = _due(regime.validate_every_n_steps, number)
                    if save or _due(regime.publish_metrics_every_n_steps, number):
                        late.append(self._publication(pending, clock))
                        pending = []
                    self._record(late, keep=0 if save or validate else publication_delay(self.device))
                    if save:
                        saved = self._save(state, number, start, cursor)
                    if stop is not None:
                        break
                    if validate:
                        self._validate(state.params, number)
                        stop = self._heard  # which may have ended it: it is made up for if the run goes on from this very step
                        if stop is not None:
                            break
                    if not pending:
                        clock = Clock(number, record_event(self.device))
            except Stopped as stopped:  # several ranks agreed on it while one of them waited for data
                stop = stopped.number
        if pending:
            late.append(self._publication(pending, clock))
        self._record(late, keep=0)
        stop = stop or self._heard
        if number == 0 and stop is not None:
            raise Stopped(stop)
        if number == 0:
            raise UsageError(NO_ROW)
        if number > saved:
            self._save(state, number, start, cursor)
        return self._end(state, number, number - first, stop)

    @property
    def _heard(self) -> Signal | None:
        """The signal that has come to a process alone, which need not ask others."""
        return self.signals.received if self.gang.alone else None

    def _start(self) -> tuple[State, Any, int]:
        """The state to begin with, the stream's cursor behind it, and its step."""
        state = init_train_state(self.recipe, self.config, self.mesh, self.device)
        size = sum(global_slice(leaf)[0].numel() for leaf in tree.leaves(state.params, is_shard))
        ranks = "" if self.gang.alone else f", {self.gang.size} ranks"
        where = f"{self.device.type} ({torch.get_num_threads()} threads{ranks})"
        self.display.line(f"{self.recipe.name}: {size:,} parameters on {where}, in {self.out}")
        if TOKENIZER in self.facts:
            self.display.line(f"tokenizer: {self.facts[TOKENIZER]}")
        found = checkpoint.newest(self.out / run_dir.CHECKPOINTS, self.display.line, self.gang)
        if found is not None:
            if not self.with_changes:
                run_dir.check_identity(self.out, found.files, self.facts)
            state = checkpoint.restore(found, state)
            if int(state.step) != found.step:
                raise CheckpointError(
                    f"{found.place}: expected the state of step {found.step}, found that of {int(state.step)}"
                )
            self.display.line(f"going on after step {found.step:,}")
        self._check_finite(state, f"{found.place}: the checkpoint" if found else "the first state")
        step, cursor = (found.step, found.cursor) if found else (0, None)
        if self.gang.leads:
            checkpoint.tidy(self.out / run_dir.CHECKPOINTS, step)
            for path in (run_dir.TRAIN, run_dir.VALID, run_dir.SPEED):
                record.rewind(self.out / path, step)
        all_gather_objects(self.gang, step)  # nobody looks at what is recorded before it is rewound
        return state, cursor, step

    def _write_down(self) -> None:
        facts = {"recipe": self.recipe.name, "seed": self.config.common.seed, **host.facts(self.device)}
        replace(self.out / run_dir.CONFIG, yaml.dump(unstructure(self.config)).encode())
        replace(self.out / run_dir.RUN, f"{json.dumps(facts, indent=2)}\n".encode())

    def _stream(self, cursor: Cursor) -> Any:
        return train_source(self.recipe, self.config, self._rank)(cursor)

    @cached_property
    def _valid(self) -> Source[Tree]:
        """Made once: it finds files and reads the tokenizer."""
        return validation_source(self.recipe, self.config, self._rank)

    @property
    def _rank(self) -> Rank:
        return Rank(self.gang, lane_assignment(self.mesh, self.config.gang.num_microbatches), self.device, self.signals)

    def _publication(self, pending: Sequence[tuple[Metrics, float]], clock: Clock) -> _Publication:
        metrics, waits = zip(*pending, strict=True)
        return _Publication(fetch(metrics, self.device), waits, clock)

    def _record(self, late: deque[_Publication], *, keep: int) -> None:
        """Takes publications out of `late` and writes them, oldest first, but for the newest `keep`."""
        while len(late) > keep:
            self._write(late.popleft())

    def _write(self, publication: _Publication) -> None:
        """Writes one line for each step. But for saving and validating, only here does the host wait for the device."""
        rows = [means(row) for row in publication.metrics.rows()]
        speed = publication.clock.speed(self.work, rows, publication.waits, publication.metrics.ready)
        if self.gang.leads:
            record.append(self.out / run_dir.TRAIN, rows)
            known = {name: value for name, value in attrs.asdict(speed).items() if value is not None}
            memory = host.peak_memory(self.device)
            record.append(self.out / run_dir.SPEED, [{"step": rows[-1]["step"], **known, "peak_memory": memory}])
        self.display.step(rows[-1], speed)
        _check_skipped(rows, self.config.trainer.max_skipped_steps)

    def _save(self, state: State, number: int, start: Cursor, cursor: Cursor) -> int:
        self._check_finite(state, f"step {number}: the state, which is not saved,")
        root, cursors = self.out / run_dir.CHECKPOINTS, all_gather_objects(self.gang, cursor)
        checkpoint.save(root, number, state, joint(start, cursors), self.facts, self.gang, self.mesh)
        if self.gang.leads and self.config.regime.keep_last_n_checkpoints is not None:
            skipped = int(state.skipped)  # what is older than these steps may be what helps a user who cannot go on
            checkpoint.prune(root, self.config.regime.keep_last_n_checkpoints, number - skipped if skipped else -1)
        return number

    def _check_finite(self, state: State, name: str) -> None:
        """Raises NonFiniteError, on all ranks, if the parameters or the optimizer's state hold what is not finite."""
        leaves = tree.paths({"params": state.params, "optimizer": state.optimizer})
        good = torch.stack([leaf.isfinite().all() for leaf in leaves.values()]).tolist()
        mine = [path for path, fine in zip(leaves, good, strict=True) if not fine]
        bad = list(dict.fromkeys(path for paths in all_gather_objects(self.gang, mine) for path in paths))
        if bad:
            raise NonFiniteError(f"{name} has numbers that are not finite: {run_dir.few(bad, 3)}")

    def _validate(self, params: Tree, number: int) -> None:
        """Records the loss on the first batches of the validation stream, unless it is recorded or a signal comes."""
        path = self.out / run_dir.VALID
        done = all_gather_objects(self.gang, self.gang.leads and record.last_step(path) >= number)[0]
        if self.recipe.validate is None or done:
            return
        sums: list[Sums] = []
        for batch, _ in islice(self._valid(None), self.config.regime.num_validation_batches):
            sums.append(self.evaluate(params, batch))
        if self._heard:
            return
        rows = fetch(sums, self.device).rows()
        total = {name: sum(row[name] for row in rows) for name in (rows[0] if rows else ())}
        if total.get("targets"):
            row = means({"step": number, **total})
            if self.gang.leads:
                record.append(path, [row])
            bits = f", {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
            self.display.line(f"step {number:,}  validation loss {row['loss']:.3f}{bits}")

    def _end(self, state: State, number: int, steps: int, received: Signal | None) -> int:
        """The last validation and the sample, or the word that goes with a signal; the exit status."""
        if received is None:
            self._validate(state.params, number)
            received = self._last(state.params)
        if received is not None:
            self.display.line(f"{received.name}: saved step {number:,}; the same command goes on from there")
            return EXIT_STATUS[received]
        self.display.line(f"done: step {number:,}, {steps:,} steps in {duration(time.monotonic() - self.started)}")
        return 0

    def _last(self, params: Tree) -> Signal | None:
        """The sample, or the signal that ended it or the validation before it."""
        if not self.gang.alone:
            if self.gang.leads or self.mesh.cuts:
                self._sample(params)
            return None
        try:
            with self.signals.interruptible():
                self._sample(params)
        except Stopped as stopped:
            return stopped.number
        return None

    def _sample(self, params: Tree) -> None:
        if self.recipe.sample is None or not self.config.regime.num_sample_tokens:
            return
        key = random.fold_in(random.key(self.config.common.seed, self.device), "sample")
        text = self.recipe.sample(self.config, params if self.mesh.sharding == "fsdp" else unshard(params), key)
        if self.gang.leads:
            replace(self.out / run_dir.SAMPLE, f"{text}\n".encode())
        self.display.line(f"sample:\n{text}")


def _parting(out: Path, gang: Gang) -> str:
    """What is said when a second signal ends a run at once."""
    if not gang.leads:
        return ""
    saved = checkpoint.committed(out / run_dir.CHECKPOINTS)
    where = f"the newest checkpoint is {saved[-1]}, and the same command goes on from there" if saved else "nothing was saved"
    return f"\nended at once: {where}\n"


def _check_skipped(rows: Sequence[Mapping[str, float]], limit: int) -> None:
    for row in rows:
        scale, finite = row.get("loss_scale"), math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])
        what = "the update" if finite else "the loss or the gradient"
        if scale is not None and row["skipped"] and not finite:
            raise NonFiniteError(
                f"step {row['step']}: {what} was not finite, and half the loss scale of {scale:g} is below "
                f"the minimum of trainer.fp16_loss_scale; the parameters are those from before the steps that were not finite"
            )
        if row["skipped"] >= limit:
            raise NonFiniteError(
                f"step {row['step']}: {what} was not finite in {limit} steps in a row "
                f"(trainer.max_skipped_steps); the parameters are those from before them"
            )


def _due(interval: int | None, number: int) -> bool:
    return interval is not None and number % interval == 0
