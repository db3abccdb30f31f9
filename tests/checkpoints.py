"""Checkpoints for several tests: small ones, what is found of them, and sums that are right for whatever is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fnrecipe import checkpoint, optim
from fnrecipe.checkpoint import manifest
from fnrecipe.checkpoint.manifest import Manifest
from fnrecipe.checkpoint.store import Checkpoint
from fnrecipe.checkpoint.tensors import Ranges, Saved
from fnrecipe.random import key
from fnrecipe.step import State, init_state
from tests.helpers import assert_same_bits

FILES = ("state_0000.safetensors", "state.json", "SHA256SUMS")
CURSOR = {"0": [1, [2, "x"]], "1": None}
FINGERPRINTS = {"a: ü/1.jsonl": "7 bytes, 0123456789abcdef", "b: 2.jsonl": "0 bytes, fedcba9876543210"}


def small_state(value: float = 1.0) -> State:
    params = {"layers": {"0": {"query": torch.full((2, 3), value)}}, "norm": torch.ones(3)}
    return init_state(params, optim.scale_by_adam(), key(0))


def save_two(root: Path) -> Path:
    """Checkpoints of steps 10 and 20, whose parameters are 10 and 20."""
    for step in (10, 20):
        checkpoint.save(root, step, small_state(float(step)), CURSOR, FINGERPRINTS)
    return root


def save_cut(root: Path, step: int, tensors: Mapping[str, Tensor], parts: int) -> Path:
    """A checkpoint as `parts` ranks write it that hold the rows of each tensor in turn; scalars are in the first file."""
    directory = root / f"step_{step:08d}"
    directory.mkdir(parents=True)
    names = [f"state_{part:04d}.safetensors" for part in range(parts)]
    saved, files = dict[str, Saved](), [dict[str, Tensor]() for _ in names]
    for path, tensor in tensors.items():
        slices, start = dict[str, Ranges](), 0
        for name, file, rows in zip(names, files, tensor.tensor_split(parts) if tensor.dim() else [tensor], strict=False):
            file[path] = rows.clone()
            slices[name] = [[start, start + len(rows)], *([0, size] for size in tensor.shape[1:])] if tensor.dim() else []
            start += len(rows) if tensor.dim() else 0
        saved[path] = Saved(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), slices)
    for name, file in zip(names, files, strict=True):
        safetensors.torch.save_file(file, directory / name)
    (directory / "state.json").write_text(manifest.text(Manifest(step, CURSOR, FINGERPRINTS, names, saved)))
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in [*names, "state.json"]}
    (directory / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return directory


def silent(text: str) -> None:
    raise AssertionError(f"no warning was expected: {text}")


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return checkpoint.newest(root, warnings.append), warnings


def assert_is_step(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert_same_bits(checkpoint.restore(found, small_state()), small_state(float(step)))


def sign(place: Path) -> None:
    """Makes the sums those of the files."""
    files = [*sorted(path.name for path in place.glob("*.safetensors")), "state.json"]
    digests = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in files}
    (place / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
