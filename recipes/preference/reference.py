"""The frozen model that a criterion compares with."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fnrecipe import interop, presets, tree
from fnrecipe.config import AdapterSection, TokenizerSection, structure
from fnrecipe.config.find import NotFoundError
from fnrecipe.config.model_dir import describe
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.data.tokenizer import describe as describe_tokenizer
from fnrecipe.errors import UsageError
from fnrecipe.parallel.mesh import Placement
from fnrecipe.streams import tokenizer_of
from fnrecipe.tree import Tree

from .config import PreferenceConfig


def reference(config: PreferenceConfig, key: Tensor, place: Placement) -> Tree:
    """The parameters of the reference model by itself: those of `reference.path`, or those that the model begins with.

    Raises:
        UsageError: if `reference.path` has another model, or one that reads other tokens.
    """
    base = attrs.evolve(config.model, adapter=AdapterSection())
    if config.reference.path is not None:
        _check(config, config.reference.path)
        other = attrs.evolve(base, path=config.reference.path, dtype=config.reference.dtype)
        return interop.pretrained(other, key, place)
    params = interop.pretrained(base, key, place) or presets.init(base, key, place)
    return kept(config, params) if config.keeps_reference else params


def kept(config: PreferenceConfig, params: Tree) -> Tree:
    """Copies of the model's parameters in the dtype of the reference model."""
    dtype = getattr(torch, config.reference.dtype)
    return tree.map(lambda leaf: leaf.to(dtype, copy=True), params)


def _check(config: PreferenceConfig, path: str) -> None:
    """Whether the model in the directory `path` is of the model's family and reads the same tokens.

    Raises:
        UsageError: if it is not.
    """
    try:
        described = describe(path, FAMILIES)
    except NotFoundError as error:
        raise UsageError(f"reference.path: expected {error.expected}, found {path}; {error.hint}") from None
    if described.family != config.model.family:
        raise UsageError(f"reference.path: expected a model of the family {config.model.family}, found {described.family}")
    if not described.tokenizer:
        return
    theirs, ours = tokenizer_of(structure(dict(described.tokenizer), TokenizerSection())), tokenizer_of(config.tokenizer)
    if theirs.fingerprint != ours.fingerprint:
        found = f"found {describe_tokenizer(theirs)} in {path}"
        raise UsageError(f"reference.path: expected the tokenizer of the model, {describe_tokenizer(ours)}, {found}")
