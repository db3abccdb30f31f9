"""What a run's data is: the facts that a checkpoint keeps, and that must hold where the run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from fnrecipe.data import Corpus, fingerprints
from fnrecipe.data.tokenizer import describe
from fnrecipe.recipe import C, Recipe
from fnrecipe.shell.directory.redact import redacted_values

RECIPE, TOKENIZER = "recipe", "tokenizer"


def identity(recipe: Recipe[C], config: C, corpora: Sequence[Corpus]) -> dict[str, str]:
    """All facts by name: those about the whole run, and a fingerprint of each file of `corpora` as `corpus: file`."""
    facts = {RECIPE: recipe.name}
    if recipe.tokenizer is not None:
        tokenizer = recipe.tokenizer(config)
        facts[TOKENIZER] = f"{describe(tokenizer)}, {tokenizer.fingerprint}"
    return {**facts, **redacted_values(fingerprints(corpora))}
