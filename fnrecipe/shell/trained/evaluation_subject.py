"""What is evaluated: the model of a run's directory or of one of Hugging Face, as a recipe, its config and its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from fnrecipe import checkpoint, random
from fnrecipe.config import DatasetSection, ModelSection, TokenizerSection, resolve
from fnrecipe.config.model_dir import is_hugging_face
from fnrecipe.data import Corpus, Tokenizer
from fnrecipe.errors import UsageError
from fnrecipe.evaluations.config import TextConfig
from fnrecipe.interop.survey import describe_model, weights_dtype
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import Recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.shell.directory import layout
from fnrecipe.shell.directory.recorded_recipe import recorded_recipe
from fnrecipe.shell.find_recipe import Named, recipe_of
from fnrecipe.shell.trained.load import Weights, is_model_dir, read_params
from fnrecipe.tree import Tree

LONGEST = 2048
"""Tokens of a row at most for a directory of Hugging Face, whose context may be a hundred times longer."""
_WHOLE = {
    "dataset.cache": "null",
    "dataset.valid_sources": "[]",
    "dataset.valid_fraction": "0",
    "gang.sharding": "replicate",
    "gang.shard_size": "null",
    "gang.tensor_parallel_size": "1",
}
"""Of a run's config, what belongs to its training alone."""


@attrs.frozen
class Subject:
    """A model to be evaluated.

    directory  where it is
    step       of the checkpoint whose parameters are evaluated; None: the newest whole one, or a directory of Hugging Face
    weights    which of its parameters
    """

    directory: Path
    recipe: Recipe[Any]
    config: TextConfig
    step: int | None
    weights: Weights = "latest"

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.recipe.tokenizer is not None
        found: Tokenizer = self.recipe.tokenizer(self.config)
        return found

    def corpora(self) -> Sequence[Corpus]:
        assert self.recipe.corpora is not None
        return self.recipe.corpora(self.config)


def subject(
    path: str,
    *,
    step: int | None = None,
    weights: Weights = "latest",
    recipe: Named | None = None,
    files: Sequence[Path] = (),
    pairs: Sequence[str] = (),
) -> Subject:
    """The model in the directory `path`, under its config with `files` and `pairs` over it.

    A run is evaluated as its recipe trains it, by its code. A directory of Hugging Face is evaluated as the recipe `lm` would
    train from it, in rows as long as its context, of `LONGEST` tokens at most.

    Raises:
        UsageError: if that is no such directory, has no tokenizer, or its recipe is not one of text as `lm` is.
    """
    if is_model_dir(path, weights, step):
        return _hugging_face(path, recipe, files, pairs)
    out = Path(path)
    if not (out / layout.CONFIG).is_file():
        instead = "neither config.json nor config.yaml in it" if out.is_dir() else "no directory"
        raise UsageError(f"{out}: expected the directory of a run, or one of Hugging Face, found {instead}")
    found = recorded_recipe(out) if recipe is None else recipe_of(recipe)
    config, _ = resolve(found.config, [out / layout.CONFIG, *files], [*_pairs(_WHOLE), *pairs])
    return _checked(Subject(out, found, config, step, weights))


def params_of(found: Subject, gang: Gang, mesh: Mesh, device: torch.device) -> tuple[Tree, int | None]:
    """The parameters as the mesh cuts them, and the step of the checkpoint that they are from, None for Hugging Face.

    Raises:
        UsageError, CheckpointError: if they cannot be read, or are not those of the config.
    """
    recipe, config = found.recipe, found.config
    if is_hugging_face(str(found.directory)):
        assert recipe.pretrained is not None
        return recipe.model(config, recipe.pretrained(config, random.key(config.common.seed, device), mesh.cut)), None
    there = checkpoint.of_run(found.directory, found.step, gang)
    return recipe.model(config, read_params(recipe, config, there, device, mesh.cut, found.weights)), there.step


def _hugging_face(path: str, recipe: Named | None, files: Sequence[Path], pairs: Sequence[str]) -> Subject:
    described = describe_model(path)
    brought = {
        "model.path": json.dumps(path),
        "model.dtype": weights_dtype(path),
        "dataset.max_seq_len": str(min(described.config.max_seq_len, LONGEST)),
        **_WHOLE,
    }
    found = recipe_of("lm" if recipe is None else recipe)
    config, origin = resolve(found.config, files, [*_pairs(brought), *pairs])
    if not described.tokenizer and origin["tokenizer.family"] in ("default", "recipe"):
        raise UsageError(f"{path}: expected a tokenizer.json in it, or tokenizer.path in the config, found no tokenizer")
    return _checked(Subject(Path(path), found, config, None))


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _checked(found: Subject) -> Subject:
    sections = {"model": ModelSection, "tokenizer": TokenizerSection, "dataset": DatasetSection}
    lacking = [name for name, kind in sections.items() if not isinstance(getattr(found.config, name, None), kind)]
    lacking += [name for name in ("corpora", "tokenizer") if getattr(found.recipe, name) is None]
    if lacking:
        expected = "a recipe of text, as lm is one, with the sections model, tokenizer and dataset, a tokenizer and corpora"
        raise UsageError(f"{found.recipe.name}: expected {expected}, found no {lacking[0]}")
    return found
