"""Recipes by name: one that comes with fnrecipe, a file, or `module:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from fnrecipe import recipes
from fnrecipe.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from fnrecipe.config.needs import Need
    from fnrecipe.recipe import Recipe


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
    if name.endswith(".py") or "/" in name:
        return _of(_import_file(Path(name)), "recipe", name, str(Path(name).resolve()))
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), attribute]):
            raise UsageError(f"{name}: expected module:attribute")
        return _of(_import_module(module), attribute, name, name)
    known = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    if name not in known:
        hint = did_you_mean(name, known)
        raise UsageError(f"{name}: no such recipe; {hint} (or path/to/recipe.py, or module:attribute)")
    package = f"{recipes.__name__}.{name}"
    light = importlib.import_module(f"{package}.config")

    def load() -> Recipe[Any]:
        return attrs.evolve(importlib.import_module(f"{package}.train").recipe, origin=name)

    return Found(light.config, light.needs, load)


def _of(module: ModuleType, attribute: str, name: str, origin: str) -> Found:
    from fnrecipe.recipe import Recipe

    recipe = getattr(module, attribute, None)
    if not isinstance(recipe, Recipe):
        found = "none" if recipe is None else type(recipe).__name__
        raise UsageError(f"{name}: expected a fnrecipe Recipe called {attribute!r} in it, found {found}")
    return Found(recipe.config, recipe.needs, lambda: attrs.evolve(recipe, origin=origin))


def _import_file(path: Path) -> ModuleType:
    """The module in the file `path`, by its name in the package that it belongs to, if it belongs to one."""
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe file")
    path = path.resolve()
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        root, parts = root.parent, [root.name, *parts]
    sys.path.insert(0, str(root))
    if len(parts) > 1:
        module = importlib.import_module(".".join(parts))
        if module.__file__ is None or not path.samefile(module.__file__):
            raise UsageError(f"{path}: its package has the name of another one, {module.__file__}; rename its folder")
        return module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"{name}: no module called {error.name} here or installed") from None
