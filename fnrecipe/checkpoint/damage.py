"""Verification of a checkpoint: its name, SHA256SUMS, state.json and files against each other.

In an undamaged one all of them agree, and are regular files: links, pipes and devices are not opened. No tensor is allocated
before everything has been checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors

from fnrecipe.checkpoint import manifest, tensors
from fnrecipe.checkpoint.manifest import Manifest
from fnrecipe.checkpoint.shard_file import AT_ONCE
from fnrecipe.errors import CheckpointError, one_line
from fnrecipe.runtime.background import map_at_once
from fnrecipe.runtime.files import check_kind, opened, read, sync

STATE, SUMS = "state.json", "SHA256SUMS"
DAMAGE = (OSError, ValueError, RuntimeError, safetensors.SafetensorError)
"""The errors by which reading shows that a checkpoint is damaged."""
UNKNOWN = (CheckpointError, PermissionError)
"""The errors after which that cannot be said: a checkpoint of another format, or one that may not be read."""

MAX_SUMS = 1 << 24
_LINE = re.compile(r"([0-9a-f]{64})  ([a-z0-9_.]+)\n")


def described(directory: Path, step: int) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a checkpoint, and the digests of its files by name.

    Raises:
        one of DAMAGE: if they cannot be read, or do not agree with each other or with `step`.
        one of UNKNOWN: if its format is unknown, or it may not be read.
    """
    check_kind(directory, stat.S_IFDIR)
    text = read(directory / SUMS, MAX_SUMS).decode()
    sums = {name: digest for digest, name in _LINE.findall(text)}
    if "".join(f"{digest}  {name}\n" for name, digest in sums.items()) != text:
        raise ValueError(f"{SUMS} is not what was written")
    state = read(directory / STATE, manifest.MAX_BYTES)
    if hashlib.sha256(state).hexdigest() != sums.get(STATE):
        raise ValueError(f"{STATE} is not what {SUMS} says")
    found = manifest.read(state)
    if list(sums) != [*found.shards, STATE]:
        raise ValueError(f"{SUMS} does not have the files of {STATE}")
    if found.step != step:
        raise ValueError(f"{STATE} is of step {found.step}")
    return found, sums


def seal(tmp: Path, sums: Mapping[str, str], contents: Manifest) -> None:
    """Writes state.json and SHA256SUMS of a checkpoint whose files are on disk with the digests `sums`; all of it is, then."""
    (tmp / STATE).write_text(manifest.text(contents), encoding="utf-8")
    lines = [f"{each}  {name}\n" for name, each in {**sums, STATE: digest(tmp / STATE)}.items()]
    (tmp / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in (tmp / STATE, tmp / SUMS, tmp):
        sync(path)


def check(directory: Path, found: Manifest, names: Sequence[str], sums: Mapping[str, str] | None = None) -> None:
    """Checks that files hold the tensors that the manifest says, and have the digests `sums` if these are given.

    Raises:
        one of DAMAGE: if they do not.
        PermissionError: if they may not be read.
    """
    headers = found.headers()
    for name in names:
        os.close(opened(directory / name))  # raises for anything but a regular file, which the library would open
        if tensors.header(directory / name) != headers[name]:
            raise ValueError(f"{name} does not hold the tensors of {STATE}")
    if sums is None:
        return
    digests = map_at_once(digest, [directory / name for name in names], limit=AT_ONCE)
    for name, is_now in zip(names, digests, strict=True):
        if is_now != sums[name]:
            raise ValueError(f"{name} is not what {SUMS} says")


def visible_damage(directory: Path, step: int) -> str:
    """What is wrong with a checkpoint, the bytes of its tensors apart; empty if nothing is, or if that cannot be said."""
    try:
        found, _ = described(directory, step)
        check(directory, found, found.shards)
    except UNKNOWN:
        return ""
    except DAMAGE as error:
        return told(error)
    return ""


def problem(directory: Path, step: int, *, every_byte: bool) -> str:
    """What keeps a checkpoint from being loaded; empty if nothing does. The bytes of tensors are read if `every_byte`."""
    try:
        found, sums = described(directory, step)
        check(directory, found, found.shards, sums if every_byte else None)
    except (*UNKNOWN, *DAMAGE) as error:
        return told(error)
    return ""


def told(error: Exception) -> str:
    """The message of an error, on one line."""
    name = Path(error.filename).name if isinstance(error, OSError) and error.filename else ""
    return one_line(f"{name}: {error.strerror}" if name else str(error))  # type: ignore[attr-defined]


def digest(path: Path) -> str:
    with open(opened(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
