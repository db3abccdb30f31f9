"""The output directory of a run: one run at a time, one config, and files in their places.

config.yaml            the resolved config; loads with --config-file
run.json               versions, command line, revision, device
metrics/train.jsonl    one line a step: loss, gradient norm, learning rate, …
metrics/valid.jsonl    one line a validation
checkpoints/           see fnrecipe.checkpoint
logs/rank_0.log        what the console said
logs/speed.jsonl       speed, use of the device, memory; the only record that differs from run to run
sample.txt             text from the trained model
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fnrecipe import checkpoint
from fnrecipe.config import yaml
from fnrecipe.config.layers import difference, flatten, values
from fnrecipe.errors import UsageError

CONFIG, RUN = "config.yaml", "run.json"
TRAIN, VALID, SPEED = Path("metrics/train.jsonl"), Path("metrics/valid.jsonl"), Path("logs/speed.jsonl")
_HOW_NOT_WHAT = {
    *("dataset.num_workers", "dataset.prefetch", "dataset.cache"),
    *("gang.sharding", "gang.shard_size", "gang.tensor_parallel_size", "gang.timeout"),
}
CHECKPOINTS, SAMPLE = "checkpoints", "sample.txt"


def log(rank: int) -> Path:
    return Path(f"logs/rank_{rank}.log")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes `out` if need be, for what the context writes there.

    Raises:
        UsageError: if it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: expected a directory to write to, found a file") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot write to the output directory: {error.strerror}") from None


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Makes `out` if need be and holds it for this process alone.

    Raises:
        UsageError: if it cannot be made or written to, or another run holds it.
    """
    with writing(out):
        (out / "logs").mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(f"{out}: another run (process {lock.read().strip() or 'unknown'}) is writing here") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def check_config(out: Path, config: dict[str, Any]) -> None:
    """Whether a run that was trained there may go on under `config`: with more steps, but no other change of what it computes.

    Raises:
        UsageError: with the difference, if there is a checkpoint of another config.
    """
    path = out / CONFIG
    if path.exists() and checkpoint.committed(out / CHECKPOINTS):
        old, new = yaml.load(path.read_text(), str(path)), flatten(config, "")
        found = difference(values(old), values(new)).items()
        changes = {k: v for k, v in found if k not in _HOW_NOT_WHAT and not _is_extension(k, *v)}
        if changes:
            raise UsageError(_refusal(out, changes))


def check_files(out: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Whether the data is that of the checkpoint, by the fingerprints of its files.

    Raises:
        UsageError: naming the files that were changed, added or taken away.
    """
    kinds = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "missing": [name for name in old if name not in new],
        "added": [name for name in new if name not in old],
    }
    lines = [f"  {kind}: {few(names)}" for kind, names in kinds.items() if names]
    if lines:
        advice = "go on with the data as it is now by --resume-with-changes, or choose another output directory"
        raise UsageError("\n".join([f"{out}: holds a run on other data; {advice}", *lines]))


def few(names: Sequence[str], limit: int = 10) -> str:
    """The first of the names, and how many there are."""
    more = f", … ({len(names):,} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _is_extension(path: str, old: Any, new: Any) -> bool:
    return path == "regime.num_steps" and isinstance(old, int) and isinstance(new, int) and new > old


def _refusal(out: Path, changes: Mapping[str, tuple[Any, Any]]) -> str:
    lines = [f"  {path}: {_show(old)} there, {_show(new)} now" for path, (old, new) in changes.items()]
    advice = "go on with the new values by --resume-with-changes, or choose another output directory"
    return "\n".join([f"{out}: holds a run with another config; {advice}", *lines])


def _show(value: Any) -> str:
    return "null" if value is None else repr(value)
