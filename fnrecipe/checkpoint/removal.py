"""Removal of checkpoints: the older ones, those that are damaged, and what a killed process left half written.

Whatever is removed is renamed first, so that no reader finds a checkpoint with some of its files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import attrs

from fnrecipe.checkpoint import keep, places
from fnrecipe.checkpoint import tensors as shards
from fnrecipe.checkpoint.damage import DAMAGE, check, described, seal, told, visible_damage
from fnrecipe.checkpoint.keep import Policy
from fnrecipe.checkpoint.places import committed, later, models
from fnrecipe.runtime.files import sync

MODEL = ("params", "average")
"""The parts of a state that hold its model: the parameters, and their average."""
_log = logging.getLogger(__name__)


def prune(
    root: Path,
    policy: Policy,
    scores: Mapping[int, float] = MappingProxyType({}),
    *,
    untouched: int = -1,
    model: Sequence[str] = MODEL,
) -> None:
    """Keeps what a policy says, by the scores of steps, and removes the rest and what a killed process left half written.

    Checkpoints up to the step `untouched` stay as they are. What keeps its model alone keeps the tensors below `model`.

    A damaged checkpoint does not count and is set aside; all but the bytes of its tensors is read to find that.
    """
    for directory in [*committed(root), *models(root)]:
        problem = visible_damage(directory, places.step_in(directory))
        if problem:
            _log.warning("%s: damaged checkpoint set aside: %s", directory, problem)
            set_aside(directory)
    _remove_halves(root)
    whole = {places.step_in(path): path for path in committed(root)}
    small = {places.step_in(path): path for path in models(root)}
    there = [keep.Entry(step, scores.get(step), model_only=step not in whole) for step in whole.keys() | small.keys()]
    found = keep.plan(there, policy, untouched=untouched)
    for step in found.model_only:
        if step in whole and (step in small or _reduce(whole[step], model)):
            _remove(whole[step])
    for step in found.removed:
        for directory in (place[step] for place in (whole, small) if step in place):
            _remove(directory)


def tidy(root: Path, step: int) -> None:
    """Sets aside the checkpoints after `step`, which `newest` passed over as damaged: the last of them is kept.

    What a killed process left half written is removed.
    """
    set_aside_after(root, step)
    _remove_halves(root)


def forget_after(root: Path, step: int) -> None:
    """Removes the checkpoints after `step`, and the models alone, the newest first."""
    for directory in later(root, step):
        _remove(directory)
    if root.exists():
        sync(root)


def set_aside_after(root: Path, step: int) -> None:
    for directory in [*committed(root), *models(root)]:
        if places.step_in(directory) > step:
            set_aside(directory)


def set_aside(directory: Path) -> None:
    """Renames a damaged checkpoint, and removes the one that was set aside before it."""
    kind = places.MODEL_ALONE if directory.name.startswith(places.MODEL_ALONE) else places.WHOLE
    for before in places.named(directory.parent, places.DAMAGED, kind):
        shutil.rmtree(before, ignore_errors=True)
    directory.rename(places.with_suffix(directory, places.DAMAGED))


def _remove_halves(root: Path) -> None:
    for path in [*places.named(root, places.TMP), *places.named(root, places.TMP, places.MODEL_ALONE)]:
        shutil.rmtree(path, ignore_errors=True)  # leaves files and links alone


def _reduce(directory: Path, model: Sequence[str]) -> bool:
    """Writes the model of a checkpoint beside it, as a checkpoint of its own; whether that has succeeded."""
    step = places.step_in(directory)
    small = places.directory_of(directory.parent, step, places.MODEL_ALONE)
    tmp = places.with_suffix(small, places.TMP)
    try:
        found, sums = described(directory, step)
        check(directory, found, found.shards, sums)  # or the sums of the copy would confirm what is damaged
        tensors = {path: saved for path, saved in found.tensors.items() if path.split(".")[0] in model}
        tmp.mkdir()
        shards_of = {name: [path for path, saved in tensors.items() if name in saved.slices] for name in found.shards}
        copies = {name: shards.copy(directory / name, tmp / name, paths) for name, paths in shards_of.items() if paths}
        seal(tmp, copies, attrs.evolve(found, shards=list(copies), tensors=tensors))
        tmp.rename(small)
        sync(small.parent)
    except DAMAGE as error:
        shutil.rmtree(tmp, ignore_errors=True)
        _log.warning("%s: cannot reduce it to its model, so that it stays as it is: %s", directory, told(error))
        return False
    return True


def _remove(directory: Path) -> None:
    removed = places.with_suffix(directory, places.TMP)  # renamed first: no reader finds a checkpoint with some of its files
    directory.rename(removed)
    shutil.rmtree(removed)
