"""Recipes by name: one that comes with fnrecipe, a file, or `module:attribute`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from fnrecipe import recipes
from fnrecipe.config.find import import_named, is_users
from fnrecipe.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from fnrecipe.config.needs import Need
    from fnrecipe.recipe import Recipe

Named: TypeAlias = "Recipe[Any] | str"
"""A recipe, or a name that `find` finds it by."""


@attrs.frozen
class Found:
    """A recipe's default config and what it needs at once, the recipe itself when it is called for: it imports torch."""

    config: Any
    needs: Callable[[Any, int], Sequence[Need]] | None
    load: Callable[[], Recipe[Any]]


def find(name: str) -> Found:
    """The recipe called `name`.

    Raises:
        UsageError: if there is none.
    """
    if is_users(name):
        return _users(name)
    known = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    if name not in known:
        hint = did_you_mean(name, known)
        raise UsageError(f"{name}: no such recipe; {hint} (or path/to/recipe.py, or module:attribute)")
    package = f"{recipes.__name__}.{name}"
    light = importlib.import_module(f"{package}.config")

    def load() -> Recipe[Any]:
        return attrs.evolve(importlib.import_module(f"{package}.train").recipe, origin=name)

    return Found(light.config, light.needs, load)


def recipe_of(recipe: Named) -> Recipe[Any]:
    """The recipe itself.

    Raises:
        UsageError: if there is none of that name.
    """
    return find(recipe).load() if isinstance(recipe, str) else recipe


def presets() -> dict[str, Path]:
    """The config files in the folders `presets` of the recipes that come with fnrecipe, by name."""
    return {path.stem: path for path in sorted(Path(recipes.__path__[0]).glob("*/presets/*.yaml"))}


def _users(name: str) -> Found:
    module, attribute = import_named(name, "recipe", "recipe file")
    from fnrecipe.recipe import Recipe

    recipe = getattr(module, attribute, None)
    if not isinstance(recipe, Recipe):
        found = "none" if recipe is None else type(recipe).__name__
        raise UsageError(f"{name}: expected a fnrecipe Recipe called {attribute!r} in it, found {found}")
    origin = name if ":" in name else str(Path(name).resolve())
    return Found(recipe.config, recipe.needs, lambda: attrs.evolve(recipe, origin=origin))
