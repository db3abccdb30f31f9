"""Whether a run that was trained in a directory may go on there: with the same config, on the same data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fnrecipe import checkpoint
from fnrecipe.config.layers import difference, flatten, read_file, values
from fnrecipe.errors import UsageError, few
from fnrecipe.shell.directory.layout import CHECKPOINTS, CONFIG
from fnrecipe.shell.directory.redact import redacted_values


def check_config(
    out: Path, config: dict[str, object], runtime: Collection[str] = (), defaults: Mapping[str, object] = MappingProxyType({})
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
        before = redacted_values({**{path: usual[path] for path in new if path in usual}, **values(old)})
        after = redacted_values(values(new))
        found = difference(before, after).items()
        changes = [path for path, pair in found if path not in runtime and not _is_extension(path, *pair)]
        if changes:
            raise UsageError(_refusal(out, changes, before, after))


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


def _is_extension(path: str, old: object, new: object) -> bool:
    return path == "regime.num_steps" and isinstance(old, int) and isinstance(new, int) and new > old


def _refusal(out: Path, changes: Sequence[str], before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """The line of each change; of a section that one side has as null, those of its keys alone."""
    sections = {path.rpartition(".")[0] for path in changes}
    lines = [
        f"  {path}: {_show_at(path, before)} there, {_show_at(path, after)} now" for path in changes if path not in sections
    ]
    advice = "go on with the new values by --resume-with-changes, or choose another output directory"
    return "\n".join([f"{out}: holds a run with another config; {advice}", *lines])


def _show_at(path: str, config: Mapping[str, object]) -> str:
    return _show(config[path]) if path in config else "nothing"


def _show(value: object) -> str:
    return "null" if value is None else repr(value)
