"""fnrecipe: recipes for training language models, as a fold of a pure step over a stream.

Nothing is imported here before it is used: whoever only reads a config or composes a stream does not wait for torch.
`fnrecipe.data`, `fnrecipe.optim`, … are the rooms of the library; `fnrecipe.Recipe` is what is trained, `fnrecipe.train` trains
it in a directory, and `fnrecipe.load` gives back what was trained there, and `fnrecipe.export` writes it for others.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fnrecipe import build as build
    from fnrecipe import checkpoint as checkpoint
    from fnrecipe import compiler as compiler
    from fnrecipe import components as components
    from fnrecipe import config as config
    from fnrecipe import contract as contract
    from fnrecipe import data as data
    from fnrecipe import errors as errors
    from fnrecipe import evaluations as evaluations
    from fnrecipe import fold as fold
    from fnrecipe import generation as generation
    from fnrecipe import inspect as inspect
    from fnrecipe import interop as interop
    from fnrecipe import loss as loss
    from fnrecipe import models as models
    from fnrecipe import nn as nn
    from fnrecipe import observe as observe
    from fnrecipe import ops as ops
    from fnrecipe import optim as optim
    from fnrecipe import parallel as parallel
    from fnrecipe import presets as presets
    from fnrecipe import random as random
    from fnrecipe import recipe as recipe
    from fnrecipe import recipes as recipes
    from fnrecipe import runtime as runtime
    from fnrecipe import shell as shell
    from fnrecipe import step as step
    from fnrecipe import streams as streams
    from fnrecipe import transforms as transforms
    from fnrecipe import tree as tree
    from fnrecipe.recipe import Recipe as Recipe
    from fnrecipe.shell.train import train as train
    from fnrecipe.shell.trained.export import export as export
    from fnrecipe.shell.trained.load import load as load

    __version__: str
else:
    from importlib import import_module
    from pkgutil import iter_modules

    _VALUES = {
        "Recipe": "fnrecipe.recipe",
        "export": "fnrecipe.shell.trained.export",
        "load": "fnrecipe.shell.trained.load",
        "train": "fnrecipe.shell.train",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("fnrecipe")
        if name in _VALUES:
            return getattr(import_module(_VALUES[name]), name)
        if name in __dir__():
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*_VALUES, "__version__", *(module.name for module in iter_modules(__path__) if module.name != "cli")])
