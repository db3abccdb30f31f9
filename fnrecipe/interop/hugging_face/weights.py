"""Weights of a directory of Hugging Face as parameters, each rank's shards of them alone."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from attrs import AttrsInstance
from safetensors import safe_open
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import UsageError
from fnrecipe.interop.hugging_face.directory import tensors_in
from fnrecipe.interop.hugging_face.names import check, places, shape_there, tied_head, with_prefix
from fnrecipe.models.hugging_face import Stored
from fnrecipe.models.model import Model
from fnrecipe.parallel.mesh import Placement
from fnrecipe.tree import Tree


class _File(Protocol):
    """What `safe_open` opens, which the library leaves untyped."""

    def get_tensor(self, name: str, /) -> Tensor: ...


def read(
    directory: Path, model: Model[AttrsInstance], config: AttrsInstance, dtype: torch.dtype, key: Tensor, place: Placement
) -> Tree:
    """The parameters of `config` in a directory, as `place(path, leaf)` leaves them, in `dtype` on the key's device.

    Raises:
        UsageError: if the files are missing or damaged, or their tensors are not those of the config.
    """
    # Tensors are views of memory-mapped files: a page of a file is read when a number on it is. So a rank reads what it keeps
    # of a parameter and no more, although `place` is given the whole of it.
    part = model.hugging_face
    assert part is not None
    outline = model.init(config, key.to("meta"), lambda path, leaf: leaf)
    leaves = tree.paths(outline)
    stored, held = places(part, config, list(leaves)), tensors_in(directory)
    wanted = {stored[path].name: shape_there(stored[path], tuple(leaf.shape)) for path, leaf in leaves.items()}
    names, tied = with_prefix(held, list(wanted)), tied_head(part, config)
    check(directory, {ours: held[theirs] for ours, theirs in names.items()}, wanted, tied or ())
    with ExitStack() as stack:

        @cache
        def opened(file: str) -> _File:
            found: _File = stack.enter_context(safe_open(directory / file, framework="pt"))
            return found

        def tensor(name: str) -> Tensor:
            return opened(held[names[name]].file).get_tensor(names[name])

        if tied is not None and tied[1] in names and not torch.equal(tensor(tied[0]), tensor(tied[1])):
            found = f"found {tied[1]} in {held[names[tied[1]]].file}, which is not {tied[0]}"
            raise UsageError(f"{directory}: expected no head of its own for model.config.tied_embeddings=true, {found}")

        def leaf(path: str) -> Tree:
            placed = place(path, _part(tensor(stored[path].name), stored[path]))
            return tree.map(lambda local: torch.empty(local.shape, dtype=dtype, device=key.device).copy_(local), placed)

        return tree.from_paths(outline, {path: leaf(path) for path in leaves})


def _part(tensor: Tensor, stored: Stored) -> Tensor:
    """What of a tensor is the parameter: a view of it."""
    whole = tensor.t() if stored.transposed else tensor
    return whole.chunk(stored.parts)[stored.part]
