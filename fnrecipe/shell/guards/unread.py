"""Keys of the config that a user has changed and that a run never reads."""

from __future__ import annotations

from typing import Any

import attrs

from fnrecipe.config import ShellConfig, unstructure
from fnrecipe.config.layers import difference, flatten, values
from fnrecipe.config.reads import READ_BY_SHELL, Watched, mentioned, unread
from fnrecipe.config.tagged import Tagged
from fnrecipe.recipe import C, Evaluation, Measurement, Recipe

FUNCTIONS = (
    "init",
    "pretrained",
    "loss",
    "update",
    "stream",
    "documents",
    "example",
    "evaluations",
    "observers",
    "recorders",
    "rules",
    "trains",
    "model",
    "sample",
    "corpora",
    "tokenizer",
    "positions",
    "flops",
)
"""The fields of a recipe that are functions of its config; not `needs`, which only estimates what the others do."""
ONLY_WITH = {
    "evaluations": ("regime.validate_every_n_steps", "regime.num_validation_batches"),
    "sample": ("regime.num_sample_tokens",),
}
"""Keys that the shell reads for the sake of a field of the recipe."""


def watch(recipe: Recipe[C], paths: set[str]) -> Recipe[C]:
    """The recipe, which adds the keys that its functions read to `paths`."""
    functions = {name: getattr(recipe, name) for name in FUNCTIONS}
    watched: dict[str, Any] = {name: Watched(function, paths) for name, function in functions.items() if function}
    named = watched.pop("evaluations")

    def evaluations(config: C) -> dict[str, Evaluation[C] | Measurement[C]]:
        return {name: _watch(evaluation, paths) for name, evaluation in named(config).items()}

    return attrs.evolve(recipe, **watched, evaluations=evaluations)


def _watch(evaluation: Evaluation[C] | Measurement[C], paths: set[str]) -> Evaluation[C] | Measurement[C]:
    if isinstance(evaluation, Measurement):
        return attrs.evolve(evaluation, make=Watched(evaluation.make, paths))
    loss = evaluation.loss and Watched(evaluation.loss, paths)
    return attrs.evolve(evaluation, stream=Watched(evaluation.stream, paths), loss=loss)


def warning(recipe: Recipe[C], config: C, paths: set[str]) -> str:
    """A line that names what differs from the recipe's own config, is not among the keys read and never will be; or ''."""
    before, now = (values(flatten(unstructure(value), "")) for value in (recipe.config, config))
    names = mentioned([*(getattr(recipe, name) for name in FUNCTIONS), recipe.evaluations(config)])
    changed = [key for key in difference(before, now) if key in now]  # others belong to what another tag has chosen
    found = unread(changed, paths | read_by_shell(recipe, config) | tags(config), names)
    listed = ", ".join(found)
    return f"config: expected keys that the recipe {recipe.name} reads, found {listed}, which it ignores" if found else ""


def read_by_shell(recipe: Recipe[C], config: C) -> set[str]:
    """The keys that the shell itself reads for a recipe."""
    there = {"evaluations": recipe.evaluations(config), "sample": recipe.sample}
    unused = {key for field, keys in ONLY_WITH.items() if not there[field] for key in keys}
    return {f"{section}.{key}" for section, keys in READ_BY_SHELL.items() for key in keys} - unused


def tags(config: ShellConfig) -> set[str]:
    """The keys that choose a section's class: what reads the config has followed them."""
    fields = {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
    return {f"{name}.{tag}" for name, section in fields.items() if isinstance(section, Tagged) for tag in section.TAGS}
