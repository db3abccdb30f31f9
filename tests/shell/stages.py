"""Recipes whose streams do something on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from fnrecipe.data import Cursor, Source, Stream, pipe
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe


def before_batch(number: int, act: Callable[[], Any]) -> Recipe[Any]:
    """The recipe, whose stream does something before it gives its batch of that number, from 1, of this process."""

    def stage(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
        for reached, entry in enumerate(source(cursor), 1):
            if reached == number:
                act()
            yield entry

    return attrs.evolve(recipe, stream=lambda config, place: pipe(recipe.stream(config, place), stage))
