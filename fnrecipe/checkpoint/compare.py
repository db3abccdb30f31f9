"""The differences of two checkpoints, tensor by tensor, however each of them is cut over files."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from fnrecipe.checkpoint.store import Checkpoint, restore
from fnrecipe.checkpoint.tensors import Saved

_CHUNK = 1 << 22
"""Elements that are compared at a time; the differences of each take 8 bytes."""


@attrs.frozen
class Difference:
    """A tensor that two checkpoints do not have alike.

    ours, theirs  what each of them has; None: nothing
    count         elements that differ: in their bits, or by value where the dtypes differ
    largest       the largest |a - b|; infinite where one of them is not finite
    relative      the largest |a - b| / max(|a|, |b|)
    """

    path: str
    ours: Saved | None
    theirs: Saved | None
    count: int = 0
    largest: float = 0.0
    relative: float = 0.0


def differences(ours: Checkpoint, theirs: Checkpoint) -> Iterator[Difference]:
    """What differs, by path, sorted; no more than one tensor of each checkpoint is in memory at a time.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    for path in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        one, other = ours.tensors.get(path), theirs.tensors.get(path)
        found = Difference(path, one, other)
        if one is not None and other is not None and list(one.shape) == list(other.shape):
            found = _compared(found, whole(ours, path).flatten(), whole(theirs, path).flatten())
        if found.count or str(one) != str(other):
            yield found


def whole(found: Checkpoint, path: str) -> Tensor:
    """One tensor of a checkpoint, unsharded, on the CPU.

    Raises:
        CheckpointError: if it cannot be read.
    """
    saved = found.tensors[path]
    like = torch.empty(tuple(saved.shape), dtype=getattr(torch, saved.dtype))
    tensor: Tensor = restore(attrs.evolve(found, tensors={path: saved}), {path: like})[path]
    return tensor


def _compared(found: Difference, ours: Tensor, theirs: Tensor) -> Difference:
    for start in range(0, len(ours), _CHUNK):
        one, other = ours[start : start + _CHUNK], theirs[start : start + _CHUNK]
        where = _differ(one, other)
        a, b = one[where], other[where]
        if not a.numel():
            continue
        distance = _distance(a, b)
        size = torch.maximum(a.double().abs(), b.double().abs())
        ratio = torch.where(distance == 0, 0.0, distance / size)
        largest, relative = (float(values.nan_to_num(torch.inf).max()) for values in (distance, ratio))
        found = attrs.evolve(
            found,
            count=found.count + a.numel(),
            largest=max(found.largest, largest),
            relative=max(found.relative, relative),
        )
    return found


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Which elements differ, in their bits where the dtypes are the same: a NaN is like itself, zeros have a sign."""
    if one.dtype == other.dtype:
        a, b = (each.view(torch.uint8).view(-1, one.itemsize) for each in (one, other))
        return (a != b).any(1)
    if one.is_floating_point() or other.is_floating_point():
        a, b = one.double(), other.double()
        return (a != b) & ~(a.isnan() & b.isnan())
    return one.long() != other.long()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|a - b| in float64, without overflow."""
    if one.is_floating_point() or other.is_floating_point():
        return (one.double() - other.double()).abs()
    a, b = one.long(), other.long()
    wrapped = (torch.maximum(a, b) - torch.minimum(a, b)).double()  # modulo 2^64; a true distance is never negative
    return torch.where(wrapped < 0, wrapped + 2.0**64, wrapped)
