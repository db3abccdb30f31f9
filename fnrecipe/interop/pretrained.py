"""The parameters that a run begins with: those of the directory that `model.path` names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fnrecipe import checkpoint, tree
from fnrecipe.config import ModelSection
from fnrecipe.config.model_dir import is_directory, is_hugging_face
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.errors import UsageError
from fnrecipe.interop.hugging_face import adapter as peft
from fnrecipe.interop.hugging_face import weights
from fnrecipe.models import adapter
from fnrecipe.models.answers import REFERENCE
from fnrecipe.models.model import Model, find_model
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree

_PARAMS = "params"


def pretrained(section: ModelSection, key: Tensor, place: Placement) -> Tree | None:
    """The parameters in the directory `section.path`, in the section's dtype on the key's device; None without a path.

    The section's adapter is beside them.

    Raises:
        UsageError, CheckpointError: if they are not there, cannot be read, or are not those of the section's config.
    """
    if section.path is None:
        return None
    if not is_directory(section.path):
        raise UsageError(f"model.path: expected a directory with weights to begin with, found none: {section.path}")
    model, dtype = find_model(section.family), getattr(torch, section.dtype)
    read = weights.read if is_hugging_face(section.path) else _of_run
    base = partial(read, Path(section.path), model, section.config, dtype, key, place)
    if section.adapter.path is None:
        return adapter.init(section, key, place, base)
    beside = peft.read(section, key, place)
    return {**base(), adapter.ADAPTER: beside}


def _of_run(
    directory: Path, model: Model[ModelConfig], config: ModelConfig, dtype: torch.dtype, key: Tensor, place: Placement
) -> Tree:
    """The parameters of the newest whole checkpoint of a run."""
    found = checkpoint.of_run(directory)
    if any(path.startswith(f"{_PARAMS}.{adapter.ADAPTER}.") for path in found.tensors):
        expected = f"the directory of an export: fnrecipe export {directory} --out DIR adds the adapter to the weights"
        raise UsageError(f"model.path: expected a model without an adapter, or {expected}; found {directory}")
    beside = f"{_PARAMS}.{REFERENCE}."
    saved = {
        path: entry for path, entry in found.tensors.items() if path.startswith(f"{_PARAMS}.") and not path.startswith(beside)
    }

    def empty(path: str, leaf: Tensor) -> Tree:
        there = saved.get(f"{_PARAMS}.{path}")
        own = leaf.dtype if there is None else getattr(torch, there.dtype)
        return tree.map(lambda local: torch.empty_like(local, dtype=own, device=key.device), place(path, leaf))

    like = {_PARAMS: model.init(config, key.to("meta"), empty)}
    restored = checkpoint.restore(attrs.evolve(found, tensors=saved), like)
    return tree.map(lambda local: local.to(dtype), restored[_PARAMS])
