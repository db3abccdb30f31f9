"""Adapters as peft keeps them: a directory of `adapter_config.json` and `adapter_model.safetensors`, both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import torch
from safetensors import safe_open
from torch import Tensor

from fnrecipe import tree
from fnrecipe.config import ModelSection
from fnrecipe.config.model_dir import is_hugging_face, read_json
from fnrecipe.config.nested import nested
from fnrecipe.errors import UsageError, few
from fnrecipe.interop.hugging_face.directory import FLOATS, Held, tensors_of
from fnrecipe.interop.hugging_face.export import part_of, save, written
from fnrecipe.interop.hugging_face.names import places
from fnrecipe.interop.hugging_face.tokenizer import pretty
from fnrecipe.models import adapter
from fnrecipe.models.adapter import ADAPTER
from fnrecipe.models.hugging_face import Stored
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NOTHING = ("alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication", "target_parameters", "lora_bias")
"""Keys of peft that ask for what an adapter of ours has not, if they are neither absent nor empty."""


@attrs.frozen
class ExportedAdapter:
    """What was written: adapted weights, the parameters beside them, and the bytes of these."""

    weights: int
    parameters: int
    size: int


def export(out: Path, model: ModelSection, params: Tree, *, dtype: torch.dtype | None) -> ExportedAdapter:
    """Writes the adapter among whole parameters as the directory `out`, which is there complete or not at all.

    Raises:
        UsageError: if there is no adapter, or one that peft cannot have beside transformers' model; if `out` is there already.
    """
    if ADAPTER not in params:
        raise UsageError("model.adapter.name: expected lora or dora for the form of peft, found null")
    stored = _stored(model)
    leaves: dict[str, Tensor] = tree.paths(params[ADAPTER])
    tensors = {name: leaves[path].to(dtype or torch.float32).contiguous() for path, name in _names(model, stored).items()}
    with written(out, replace=False) as folder:
        save(folder / WEIGHTS, tensors)
        (folder / CONFIG).write_bytes(pretty(_config(model, stored)))
    count = sum(tensor.numel() for tensor in tensors.values())
    return ExportedAdapter(len(stored), count, sum(tensor.nbytes for tensor in tensors.values()))


def read(model: ModelSection, key: Tensor, place: Placement) -> Tree:
    """The adapter in the directory `model.adapter.path`, as `place(path, leaf)` leaves it, in float32 on the key's device.

    Raises:
        UsageError: if it cannot be read, or is not that of the section.
    """
    assert model.adapter.path is not None
    directory = Path(model.adapter.path)
    problems = list(_differences(model, directory / CONFIG, read_json(directory / CONFIG)))
    held, names = tensors_of(directory, WEIGHTS), _names(model, _stored(model))
    problems += _tensors(model, directory / WEIGHTS, held, names)
    if problems:
        raise UsageError("\n".join(problems))
    with safe_open(directory / WEIGHTS, framework="pt") as file:

        def leaf(path: str, name: str) -> Tree:
            tensor: Tensor = file.get_tensor(name)
            return place(f"{ADAPTER}.{path}", tensor.to(key.device, torch.float32))

        return nested({path: leaf(path, name) for path, name in names.items()})


def _stored(model: ModelSection) -> dict[str, Stored]:
    """Where the adapted weights lie, by their paths.

    Raises:
        UsageError: if one is only a part of a tensor.
    """
    found = places(part_of(model), model.config, list(adapter.targets(model)))
    for path, stored in found.items():
        if stored.parts > 1:
            expected = f"weights that are tensors of their own for the form of peft, in which {stored.name} is one"
            raise UsageError(f"model.adapter.targets: expected {expected}, found {path}, a part of it")
    return found


def _names(model: ModelSection, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Peft's names of the parameters of the adapter, by their paths in it."""
    parts = {part: name for part, name in _PARTS.items() if part != "magnitude" or model.adapter.name == "dora"}
    modules = {path: f"base_model.model.{_module(place)}" for path, place in stored.items()}
    return {f"{path}.{part}": f"{module}.{name}" for path, module in modules.items() for part, name in parts.items()}


def _module(stored: Stored) -> str:
    return stored.name.removesuffix(".weight")


def _config(model: ModelSection, stored: Mapping[str, Stored]) -> dict[str, object]:
    section = model.adapter
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.path if model.path is not None and is_hugging_face(model.path) else None,
        "r": section.rank,
        "lora_alpha": section.alpha,
        "target_modules": _target_modules(model, stored),
        "use_dora": section.name == "dora",
        "use_rslora": False,
        "fan_in_fan_out": all(place.transposed for place in stored.values()),
        "bias": "none",
        "lora_dropout": section.dropout,
        "inference_mode": True,
    }


def _target_modules(model: ModelSection, stored: Mapping[str, Stored]) -> list[str]:
    """The last words of the modules' names, as they are commonly given; whole names where not all of a kind are adapted."""
    every = attrs.evolve(model, adapter=attrs.evolve(model.adapter, targets=("*",)))
    others = set(adapter.targets(every)) - set(stored)
    last = {_module(place).rpartition(".")[2] for place in stored.values()}
    left = places(part_of(model), model.config, list(others))
    partly = any(_module(place).rpartition(".")[2] in last for place in left.values())
    return sorted(map(_module, stored.values()) if partly else last)


def _differences(model: ModelSection, path: Path, said: Mapping[str, object]) -> Iterator[str]:
    """What a config of peft says that the section does not, a line each."""
    section = model.adapter
    if said.get("peft_type") != "LORA":
        yield f"{path}: expected the peft_type LORA, found {said.get('peft_type')!r}"
        return
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        yield f"{path}: expected numbers r and lora_alpha, found {rank!r} and {alpha!r}"
        return
    alpha = alpha * math.sqrt(rank) if said.get("use_rslora") else alpha
    kind = "dora" if said.get("use_dora") else "lora"
    for key, theirs, ours in (("name", kind, section.name), ("rank", rank, section.rank), ("alpha", alpha, section.alpha)):
        if theirs != ours:
            yield f"model.adapter.{key}: expected {theirs}, as {path} has it, found {ours}"
    asked = [key for key in _NOTHING if said.get(key)]
    if asked or said.get("bias", "none") != "none":
        yield f"{path}: expected an adapter of low rank alone, found {few([*asked, 'bias'][: len(asked) or 1])}"


def _tensors(model: ModelSection, path: Path, held: Mapping[str, Held], names: Mapping[str, str]) -> Iterator[str]:
    """What of the tensors in the file at `path` is not as the section wants it, a line each."""
    missing, extra = ([*set(one) - set(other)] for one, other in ((names.values(), held), (held, names.values())))
    targets = f"the weights that model.adapter.targets={list(model.adapter.targets)} fits"
    if missing:
        yield f"{path}: expected {targets}, missing: {few(sorted(missing))}"
    if extra:
        yield f"{path}: expected {targets}, left over: {few(sorted(extra))}"
    shapes, rank = adapter.targets(model), model.adapter.rank
    for inner, name in names.items():
        weight, _, part = inner.rpartition(".")
        out, width = shapes[weight]
        wanted = {"a": (rank, width), "b": (out, rank), "magnitude": (out,)}[part]
        if name in held and (held[name].shape != wanted or held[name].dtype not in FLOATS):
            found = f"{held[name].dtype} {list(held[name].shape)}"
            yield f"{path}: {name}: expected the shape {list(wanted)}, found {found}"
