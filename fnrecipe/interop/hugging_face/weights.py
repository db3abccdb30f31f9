"""Weights of a directory of Hugging Face as parameters, each rank's shards of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Protocol

import attrs
import torch
from safetensors import safe_open
from torch import Tensor

from fnrecipe import tree
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.errors import UsageError
from fnrecipe.interop.hugging_face.directory import Held, tensors_in
from fnrecipe.interop.hugging_face.names import check, places, shape_there, tied_head, with_prefix
from fnrecipe.models.hugging_face import Stored
from fnrecipe.models.model import Model
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree


class _File(Protocol):
    """What `safe_open` opens, which the library leaves untyped."""

    def get_tensor(self, name: str, /) -> Tensor: ...


def read(
    directory: Path, model: Model[ModelConfig], config: ModelConfig, dtype: torch.dtype, key: Tensor, place: Placement
) -> Tree:
    """The parameters of `config` in a directory, as `place(path, leaf)` leaves them, in `dtype` on the key's device.

    Raises:
        UsageError: if the files are missing or damaged, or their tensors are not those of the config.
    """
    # Tensors are views of memory-mapped files: a page of a file is read when a number on it is. So a rank reads what it keeps
    # of a parameter and no more, although `place` is given the whole of it.
    outline = init_outline(model, config)
    found = find(directory, model, config, outline)
    with ExitStack() as stack:

        @cache
        def opened(file: str) -> _File:
            found: _File = stack.enter_context(safe_open(directory / file, framework="pt"))
            return found

        def tensor(name: str) -> Tensor:
            return opened(found.held[name].file).get_tensor(found.names[name])

        if found.tied is not None and not torch.equal(*map(tensor, found.tied)):
            embedding, head = found.tied
            place_of = f"found {head} in {found.held[head].file}, which is not {embedding}"
            raise UsageError(f"{directory}: expected no head of its own for model.config.tied_embeddings=true, {place_of}")

        def leaf(path: str) -> Tree:
            placed = place(path, _part(tensor(found.stored[path].name), found.stored[path]))
            return tree.map(lambda local: torch.empty(local.shape, dtype=dtype, device=key.device).copy_(local), placed)

        return tree.from_paths(outline, {path: leaf(path) for path in found.stored})


def init_outline(model: Model[ModelConfig], config: ModelConfig) -> Tree:
    """The parameters without their numbers, on the device meta."""
    key = torch.empty(2, dtype=torch.int64, device="meta")
    outline: Tree = model.init(config, key, lambda path, leaf: leaf)
    return outline


@attrs.frozen
class Found:
    """The tensors of a directory that are the parameters of a config.

    stored  where each parameter lies, by its path
    held    the tensors, by the names that the family has for them, and `names`, what they are called in the files
    tied    the names of the embedding, and of the head that is there although the config ties it; None if none is there
    """

    stored: Mapping[str, Stored]
    held: Mapping[str, Held]
    names: Mapping[str, str]
    tied: tuple[str, str] | None


def find(directory: Path, model: Model[ModelConfig], config: ModelConfig, outline: Tree) -> Found:
    """Finds the parameters of `config` by the headers of the files.

    Raises:
        UsageError: if the files are missing or damaged, or their tensors are not those of the config.
    """
    part = model.hugging_face
    assert part is not None
    leaves = tree.paths(outline)
    stored, there = places(part, config, list(leaves)), tensors_in(directory)
    wanted = {stored[path].name: shape_there(stored[path], tuple(leaf.shape)) for path, leaf in leaves.items()}
    names, tied = with_prefix(there, list(wanted)), tied_head(part, config)
    held = {ours: there[theirs] for ours, theirs in names.items()}
    check(directory, held, wanted, tied or ())
    return Found(stored, held, names, tied if tied is not None and tied[1] in held else None)


def _part(tensor: Tensor, stored: Stored) -> Tensor:
    """What of a tensor is the parameter: a view of it."""
    whole = tensor.t() if stored.transposed else tensor
    return whole.chunk(stored.parts)[stored.part]
