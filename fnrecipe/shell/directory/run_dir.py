"""The output directory of a run: one run at a time, one config, and files in their places.

config.yaml            the resolved config; loads with --config-file
run.json               versions, command line, revision, device
products.json          what computes the large matrix products, as it was measured on the processor that the run began on
metrics/train.jsonl    one line a step: loss, gradient norm, learning rate, …
metrics/NAME.jsonl     one line an evaluation NAME, such as `valid`
metrics/spikes.jsonl   one line a step that was skipped, with its documents, under `regime.on_spike`
metrics/hashes.jsonl   one line a hash of the state, with `regime.hash_every_n_steps`
samples/NAME.jsonl     texts of an evaluation NAME, each with its step
checkpoints/           see fnrecipe.checkpoint
logs/rank_0.log        what the console said, and errors, each line with its time
logs/perf.jsonl        speed, use of the device, memory; the only record that differs from run to run
aside/N/               what `--from-step` has set aside: newer checkpoints, with the records that went with them
tensorboard/           the same for TensorBoard, where that is installed
rollbacks.jsonl        what was passed over, with `regime.on_spike=rollback`
sample.txt             text from the trained model
hugging_face/          the model as others load it, with `regime.export_hugging_face`
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fnrecipe import checkpoint
from fnrecipe.config.layers import difference, flatten, read_file, values
from fnrecipe.errors import FnrecipeError, UsageError, few
from fnrecipe.runtime.files import make_folder, opened
from fnrecipe.shell.directory.recorded_recipe import CONFIG as CONFIG
from fnrecipe.shell.directory.recorded_recipe import RUN as RUN
from fnrecipe.shell.directory.redact import redacted_values

CHECKPOINTS, PRODUCTS, ROLLBACKS = "checkpoints", "products.json", "rollbacks.jsonl"
SAMPLE, HUGGING_FACE = "sample.txt", "hugging_face"
LOCK = ".lock"


def log(rank: int) -> Path:
    return Path(f"logs/rank_{rank}.log")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes `out` if need be, for what the context writes there.

    Raises:
        UsageError: if it cannot be made or written to.
    """
    try:
        make_folder(out)
        yield
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: expected a directory to write to, found a file") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot write to the output directory: {error.strerror}") from None


@contextmanager
def claimed(out: Path) -> Iterator[int]:
    """Makes `out` if need be and holds it for this process alone; gives a descriptor of it, by which `check_claim` knows it.

    Raises:
        UsageError: if it cannot be made or written to, or another run holds it.
    """
    with writing(out):
        for folder in ("metrics", "logs"):
            (out / folder).mkdir(exist_ok=True)
        claim = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    with _closed(claim), _closed(_open_lock(out)) as lock:
        _hold(out, lock)
        yield claim


def check_claim(out: Path, claim: int | None) -> None:
    """Whether `out` is still the directory that was claimed; None where it was not.

    Raises:
        FnrecipeError: if it was removed, renamed or replaced.
    """
    if claim is None:
        return
    there = False
    with suppress(FileNotFoundError, NotADirectoryError):
        there = os.path.samestat(out.stat(), os.fstat(claim))
    if not there:
        raise FnrecipeError(f"{out}: the output directory was removed, renamed or replaced while the run was writing to it")


def _open_lock(out: Path) -> int:
    path = out / LOCK
    try:
        return opened(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UsageError(f"{path}: cannot open the lock of the output directory: {error.strerror}") from None


def _hold(out: Path, lock: int) -> None:
    """Locks the open file `lock` and writes the number of this process into it, and a word that no other claim has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").partition("\n")[0]
        process = holder if holder.isdecimal() else "unknown"
        raise UsageError(f"{out}: another run (process {process}) is writing here") from None
    except OSError as error:
        advice = "choose an output directory on a file system that locks files"
        raise UsageError(f"{out}: cannot lock the output directory: {error.strerror}; {advice}") from None
    with writing(out):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n{secrets.token_hex(16)}\n".encode(), 0)
        os.fsync(lock)


@contextmanager
def _closed(descriptor: int) -> Iterator[int]:
    """The open file `descriptor`, closed after the context."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_config(
    out: Path, config: dict[str, Any], runtime: Collection[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Whether a run that was trained there may go on under `config`: with more steps, but no other change of what it computes.

    `runtime`: the paths of values that change only how it is computed. `defaults`: what the config is if nothing is written of
    it, as a run that was trained before there was a key has it.

    Raises:
        UsageError: with the difference, if there is a checkpoint of another config; if that cannot be read.
    """
    path = out / CONFIG
    try:
        trained = path.exists() and checkpoint.committed(out / CHECKPOINTS)
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot read the output directory: {error.strerror}") from None
    if trained:
        old, new = read_file(path, bounded=False), flatten(config, "")
        usual = values(flatten(dict(defaults), ""))
        before = {**{path: usual[path] for path in usual.keys() & new.keys()}, **values(old)}
        found = difference(redacted_values(before), redacted_values(values(new))).items()
        changes = {k: v for k, v in found if k not in runtime and not _is_extension(k, *v)}
        if changes:
            raise UsageError(_refusal(out, changes))


def check_identity(out: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Whether the data is that of the checkpoint, by its facts (`fnrecipe.shell.directory.identity`).

    Raises:
        UsageError: with the facts about the run that differ, and the names of files that were changed, added or taken away.
    """
    old, new = redacted_values(dict(old)), redacted_values(dict(new))
    changes = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    facts, files = ([name for name in changes if (": " in name) == is_file] for is_file in (False, True))
    kinds = {
        "changed": [name for name in files if name in old and name in new],
        "missing": [name for name in files if name not in new],
        "added": [name for name in files if name not in old],
    }
    if changes:
        what = " and ".join([f"with another {name}" for name in facts] + ["on other data"] * bool(files))
        advice = "go on with the data as it is now by --resume-with-changes, or choose another output directory"
        lines = [f"  {name}: {_show(old.get(name))} there, {_show(new.get(name))} now" for name in facts]
        lines += [f"  {kind}: {few(names)}" for kind, names in kinds.items() if names]
        raise UsageError("\n".join([f"{out}: holds a run {what}; {advice}", *lines]))


def _is_extension(path: str, old: Any, new: Any) -> bool:
    return path == "regime.num_steps" and isinstance(old, int) and isinstance(new, int) and new > old


def _refusal(out: Path, changes: Mapping[str, tuple[Any, Any]]) -> str:
    lines = [f"  {path}: {_show(old)} there, {_show(new)} now" for path, (old, new) in changes.items()]
    advice = "go on with the new values by --resume-with-changes, or choose another output directory"
    return "\n".join([f"{out}: holds a run with another config; {advice}", *lines])


def _show(value: Any) -> str:
    return "null" if value is None else repr(value)
