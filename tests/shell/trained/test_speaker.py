"""What a run is spoken with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fnrecipe.config import resolve
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.recipes.sft.train import recipe as sft
from fnrecipe.shell.trained.speaker import templates_of


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        (
            sft,
            ["dataset.chat_template=chat.jinja", "tokenizer.family=hf", "tokenizer.path=there/tokenizer.json"],
            Path("chat.jinja"),
        ),
        (sft, ["tokenizer.family=hf", "tokenizer.path=there/tokenizer.json"], Path("there")),
        (lm, ["tokenizer.family=hf", "tokenizer.path=there/tokenizer.json"], Path("there")),
        (lm, [], None),
    ],
)
def test_the_template_is_that_of_the_examples_or_lies_beside_the_tokenizer(
    recipe: Recipe[Any], given: list[str], expected: Path | None
) -> None:
    config, _ = resolve(recipe.config, (), given)
    assert templates_of(config, config.tokenizer) == expected
