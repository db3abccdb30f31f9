"""What a user names: a component that comes with fnrecipe, a value in a Python file, or `module:attribute`.

What comes with fnrecipe is found without torch; a file or a module of the user's is imported as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

import attrs

from fnrecipe.config.paths import expanded
from fnrecipe.errors import UsageError, did_you_mean

T = TypeVar("T")


@attrs.frozen
class Kind(Generic[T]):
    """Components of one kind, values of type T, each with a class `config` of its configs: the families of models, say.

    cls        the module and the name of the class of one of them
    package    the package that holds those that come with fnrecipe: a module each, called by its name
    light      the module and the attribute within that hold the torch-free part of one: "config:family", or ":optimizer"
    attribute  what the value is called in a file of the user's
    """

    cls: str
    package: str
    light: str
    attribute: str


class NotFoundError(Exception):
    """A name that names nothing: what is expected of it, and a hint."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected, self.hint = expected, hint


def known(kind: Kind[T]) -> list[str]:
    """The names of the components that come with fnrecipe."""
    path = importlib.import_module(kind.package).__path__
    packages = not kind.light.startswith(":")
    return sorted(info.name for info in pkgutil.iter_modules(path) if info.ispkg == packages)


def find_component(name: object, kind: Kind[T]) -> T:
    """The component called `name`, or the torch-free part of one that comes with fnrecipe.

    Raises:
        NotFoundError: if there is none.
    """
    names = known(kind)
    if name in names:
        module, _, attribute = kind.light.partition(":")
        part = importlib.import_module(".".join(filter(None, [kind.package, str(name), module])))
        return cast("T", getattr(part, attribute))
    expected = f"{' or '.join(names)} or path/to/file.py or module:attribute"
    if not isinstance(name, str):
        raise NotFoundError(expected)
    if not is_users(name):
        raise NotFoundError(expected, did_you_mean(name, names))
    try:
        module_found, attribute = import_named(name, kind.attribute)
    except UsageError as error:
        raise NotFoundError(expected, str(error)) from None
    found = getattr(module_found, attribute, None)
    cls = getattr(importlib.import_module(kind.cls.partition(":")[0]), kind.cls.partition(":")[2])
    if not isinstance(found, cls):
        shown = "none" if found is None else type(found).__name__
        raise NotFoundError(expected, f"{name}: expected a fnrecipe {cls.__name__} called {attribute!r} in it, found {shown}")
    if not _has_defaults(getattr(found, "config", None)):
        raise NotFoundError(expected, f"{name}: expected its `config` to be an attrs class with a default for each field")
    return cast("T", found)


def _has_defaults(config: object) -> bool:
    return isinstance(config, type) and attrs.has(config) and all(f.default is not attrs.NOTHING for f in attrs.fields(config))


def is_users(name: str) -> bool:
    """Whether a name is one of a file or of `module:attribute`."""
    return name.endswith(".py") or "/" in name or ":" in name


def import_named(name: str, attribute: str, what: str = "file") -> tuple[ModuleType, str]:
    """The module that `path/to/file.py` or `module:attribute` names, and the attribute; in a file it is called `attribute`.

    Raises:
        UsageError: if there is no such module.
    """
    if name.endswith(".py") or "/" in name:
        return _import_file(Path(expanded(name)), what), attribute
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise UsageError(f"{name}: expected module:attribute")
    return _import_module(module), attribute


def _import_file(path: Path, what: str) -> ModuleType:
    """The module in the file `path`, by its name in the package that it belongs to, if it belongs to one."""
    if not path.is_file():
        raise UsageError(f"{path}: no such {what}")
    path = path.resolve()
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        root, parts = root.parent, [root.name, *parts]
    _look_first_in(str(root))
    if len(parts) > 1:
        module = importlib.import_module(".".join(parts))
        if module.__file__ is None or not path.samefile(module.__file__):
            raise UsageError(f"{path}: its package has the name of another one, {module.__file__}; rename its folder")
        return module
    there = sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) is not None and path.samefile(str(there.__file__)):
        return there  # what was made of its classes stays equal to what is made of them later
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    _look_first_in("")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"{name}: no module called {error.name} here or installed") from None


def _look_first_in(root: str) -> None:
    if sys.path[:1] != [root]:
        sys.path.insert(0, root)
