"""What a run has written of itself: its config, and where its recipe is found. No torch is imported to read that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fnrecipe.errors import UsageError, one_line
from fnrecipe.runtime.files import read
from fnrecipe.shell.find_recipe import Found, find

if TYPE_CHECKING:
    from fnrecipe.recipe import Recipe

CONFIG, RUN = "config.yaml", "run.json"
_MAX_BYTES = 1 << 20


def recorded(out: Path, advice: str) -> Found:
    """The recipe that the `run.json` of a run names; `advice` says what to do where it cannot be found again.

    Raises:
        UsageError: if there is no such file, or the recipe is not found; by `load`, if it is another one.
    """
    try:
        facts = json.loads(read(out / RUN, _MAX_BYTES))
        name, origin = facts["recipe"], facts.get("origin")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{out}: expected the output directory of a run, found {instead(out, RUN)}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"{out / RUN}: expected what a run writes there, found {found}") from None
    if not isinstance(origin, str):
        raise UsageError(f"{out}: its recipe {name!r} was no file or module that could be found again; {advice}")
    try:
        there = find(origin)
    except UsageError as error:
        raise UsageError(f"{out}: cannot find its recipe {name!r} again: {error}; {advice}") from None

    def load() -> Recipe[Any]:
        recipe = there.load()
        if recipe.name != name:
            raise UsageError(f"{out}: expected its recipe {name!r} in {origin}, found {recipe.name!r}; {advice}")
        return recipe

    return attrs.evolve(there, load=load)


def recorded_recipe(out: Path) -> Recipe[Any]:
    """The recipe that the `run.json` of a run names.

    Raises:
        UsageError: if there is no such file, or the recipe is not found or another one.
    """
    return recorded(out, "give it, as in load(run, recipe=…)").load()


def instead(out: Path, name: str) -> str:
    """What is found where the output directory of a run was expected."""
    return f"no {name} in it" if out.is_dir() else "no directory"
