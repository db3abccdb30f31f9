"""The tensors in a directory of Hugging Face, by the headers of its safetensors files. No torch here, and no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import attrs
from safetensors import SafetensorError, safe_open

from fnrecipe.config.model_dir import read_json
from fnrecipe.errors import UsageError, few, one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of weights, by safetensors' names, and torch's names for them."""
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _File(Protocol):
    """What `safe_open` opens, which the library leaves untyped."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str, /) -> _Slice: ...


@attrs.frozen
class Held:
    """A tensor in a file: the file's name, the dtype by safetensors' name, and the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def tensors_in(directory: Path) -> dict[str, Held]:
    """Every tensor of the model in `directory`, by its name.

    Raises:
        UsageError: if there are no safetensors files, one is missing, damaged or not what the index says, or a tensor is in
            two of them.
    """
    if (directory / WEIGHTS).is_file():
        return tensors_of(directory, WEIGHTS)
    if (directory / INDEX).is_file():
        return _indexed(directory)
    pickled = next((name for name in _PICKLED if (directory / name).is_file()), None)
    found = f"only {pickled}, a pickle, which executes code when it is read" if pickled else "neither"
    raise UsageError(f"{directory}: expected {WEIGHTS} or {INDEX}, found {found}")


def dtype_of(held: Mapping[str, Held]) -> str:
    """The dtype that keeps every number of the tensors, by torch's name: theirs, or float32 if they have several."""
    found = {FLOATS.get(tensor.dtype, tensor.dtype) for tensor in held.values()}
    return found.pop() if len(found) == 1 else "float32"


def _indexed(directory: Path) -> dict[str, Held]:
    """The tensors of the files that an index names; each must be where the index says, and nowhere else."""
    path = directory / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
        raise UsageError(f"{path}: expected a weight_map of names of tensors to names of files in this directory")
    held: dict[str, Held] = {}
    twice, elsewhere = [], []
    for file in sorted(set(places.values())):
        found = tensors_of(directory, file)
        twice += [f"{name} ({held[name].file} and {file})" for name in found if name in held]
        elsewhere += [f"{name} ({file})" for name in found if places.get(name) != file]
        held |= found
    lost = [f"{name} ({file})" for name, file in places.items() if name not in held]
    for problem, names in (
        ("tensors in two files", twice),
        ("tensors that it says are elsewhere, or nowhere", elsewhere),
        ("tensors that are not in their files", lost),
    ):
        if names:
            raise UsageError(f"{path}: expected each tensor once, in the file that it names, found {problem}: {few(names)}")
    return held


def tensors_of(directory: Path, name: str) -> dict[str, Held]:
    """Every tensor of the file `name` in `directory`, by its name.

    Raises:
        UsageError: if it is not there, or is damaged.
    """
    path = directory / name
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as opened:
            file = cast("_File", opened)
            slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 it is no mapping
            return {tensor: Held(name, part.get_dtype(), tuple(part.get_shape())) for tensor, part in slices.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot read it: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UsageError(one_line(f"{path}: not a whole safetensors file: {error}")) from None
