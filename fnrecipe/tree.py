"""Trees of tensors: nested dicts, tuples and registered attrs classes with tensors at the leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor

Tree: TypeAlias = Any
"""A tree of tensors; a leaf is a tree, too. Python's types cannot say which shape it has."""

C = TypeVar("C", bound=type)


STATIC = {"static": True}
"""Metadata of a field that is no child of a `node` but part of its structure: it is compared, and no tensor."""


def node(cls: C) -> C:
    """Class decorator: registers a frozen attrs class as a tree whose children are its fields, but for the `STATIC` ones."""
    fields = attrs.fields(cls)
    names = [field.name for field in fields if not field.metadata.get("static")]
    static = [field.name for field in fields if field.metadata.get("static")]
    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], tuple((name, getattr(value, name)) for name in static)),
        lambda children, context: cls(**dict(zip(names, children, strict=True)), **dict(context)),
        serialized_type_name=f"fnrecipe.{cls.__name__}",
        flatten_with_keys_fn=lambda value: ([(pytree.GetAttrKey(n), getattr(value, n)) for n in names], None),
    )
    return cls


def from_numpy(value: Tree) -> Tree:
    """A tree of NumPy arrays as one of tensors that share their memory; its attrs classes are nodes from then on.

    What is a tensor already stays it.
    """
    _register(value)
    return map(torch.as_tensor, value)


def _register(value: Tree) -> None:
    cls = type(value)
    if attrs.has(cls) and cls not in pytree.SUPPORTED_NODES:
        node(cls)
    for child in pytree.tree_flatten(value, lambda inner: inner is not value)[0]:
        if child is not value:
            _register(child)


def leaves(tree: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> list[Tree]:
    """The leaves of `tree`, left to right; a subtree for which `is_leaf` holds counts as a leaf."""
    return pytree.tree_leaves(tree, is_leaf)


def like(tree: Tree, leaves: Sequence[Tree]) -> Tree:
    """The leaves in the structure of `tree`."""
    return pytree.tree_unflatten(leaves, pytree.tree_structure(tree))


def map(function: Callable[..., Tree], tree: Tree, *others: Tree) -> Tree:
    """`function` applied to each leaf of `tree` and the corresponding leaves of the others."""
    return pytree.tree_map(function, tree, *others)


def select(condition: Tensor, yes: Tree, no: Tree) -> Tree:
    """`torch.where` leaf by leaf: `yes` if the 0-d bool `condition` holds, else `no`, with no host sync."""
    return map(lambda a, b: torch.where(condition, a, b), yes, no)


def paths(tree: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> dict[str, Tree]:
    """The leaves, as `leaves` finds them, by their dotted paths: `{"params.layers.0.query": …}`."""
    found, _ = pytree.tree_flatten_with_path(tree, is_leaf)
    return {".".join(filter(None, (_name(key) for key in path))): leaf for path, leaf in found}


def from_paths(tree: Tree, values: Mapping[str, Tree]) -> Tree:
    """The leaves `values`, by dotted path, in the structure of `tree`."""
    return like(tree, [values[path] for path in paths(tree)])


def _name(key: pytree.KeyEntry) -> str:
    match key:
        case pytree.MappingKey():
            return str(key.key)
        case pytree.SequenceKey():
            return str(key.idx)
    assert isinstance(key, pytree.GetAttrKey)
    return key.name
