"""What is wrong with a checkpoint: its name, SHA256SUMS, state.json and files against each other.

Of a whole one all of them agree, and are what they should be: files, not links, pipes or devices. Nothing is opened that
could not be, and no tensor is made before all of it has been checked.
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
from fnrecipe.errors import CheckpointError, one_line
from fnrecipe.runtime.files import check_kind, opened, read

STATE, SUMS = "state.json", "SHA256SUMS"
DAMAGE = (OSError, ValueError, RuntimeError, safetensors.SafetensorError)
"""What reading a damaged checkpoint raises."""
UNKNOWN = (CheckpointError, PermissionError)
"""What reading one raises of which it cannot be said whether it is damaged: of another format, or of another user."""

_MAX_SUMS = 1 << 24
_LINE = re.compile(r"([0-9a-f]{64})  ([a-z0-9_.]+)\n")


def described(place: Path, step: int) -> tuple[Manifest, dict[str, str]]:
    """What a checkpoint says of itself: its manifest, and the digests of its files by name.

    Raises:
        one of DAMAGE: if they cannot be read, or do not agree with each other or with `step`.
        one of UNKNOWN: if that cannot be said.
    """
    check_kind(place, stat.S_IFDIR)
    text = read(place / SUMS, _MAX_SUMS).decode()
    sums = {name: digest for digest, name in _LINE.findall(text)}
    if "".join(f"{digest}  {name}\n" for name, digest in sums.items()) != text:
        raise ValueError(f"{SUMS} is not what was written")
    state = read(place / STATE, manifest.MAX_BYTES)
    if hashlib.sha256(state).hexdigest() != sums.get(STATE):
        raise ValueError(f"{STATE} is not what {SUMS} says")
    found = manifest.read(state)
    if list(sums) != [*found.shards, STATE]:
        raise ValueError(f"{SUMS} does not have the files of {STATE}")
    if found.step != step:
        raise ValueError(f"{STATE} is of step {found.step}")
    return found, sums


def check(place: Path, found: Manifest, names: Sequence[str], sums: Mapping[str, str] | None = None) -> None:
    """Whether files hold the tensors that the manifest says, and have the digests `sums`, if they are given.

    Raises:
        one of DAMAGE: if not.
        PermissionError: if they may not be read.
    """
    headers = found.headers()
    for name in names:
        os.close(opened(place / name))  # the library would open anything
        if tensors.header(place / name) != headers[name]:
            raise ValueError(f"{name} does not hold the tensors of {STATE}")
        if sums is not None and digest(place / name) != sums[name]:
            raise ValueError(f"{name} is not what {SUMS} says")


def visible_damage(place: Path, step: int) -> str:
    """What is wrong with a checkpoint, but for the bytes of its tensors."""
    try:
        found, _ = described(place, step)
        check(place, found, found.shards)
    except UNKNOWN:
        return ""
    except DAMAGE as error:
        return told(error)
    return ""


def told(error: Exception) -> str:
    """The error in one line."""
    name = Path(error.filename).name if isinstance(error, OSError) and error.filename else ""
    return one_line(f"{name}: {error.strerror}" if name else str(error))  # type: ignore[attr-defined]


def digest(path: Path) -> str:
    with open(opened(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
