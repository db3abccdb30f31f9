"""Directories that hold a model, and what they say of it: one of Hugging Face by `config.json`, a run by its `config.yaml`.

Weights are not looked at here, and nothing in a directory is executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from fnrecipe.config import yaml
from fnrecipe.config.find import Kind, NotFoundError, find_component, known
from fnrecipe.config.nested import nested
from fnrecipe.config.paths import expanded
from fnrecipe.config.structure import structure
from fnrecipe.errors import ConfigError, UsageError, did_you_mean, shortened

if TYPE_CHECKING:
    from fnrecipe.config.sections.model import ModelConfig
    from fnrecipe.models.model import Family

HUGGING_FACE, RUN = "config.json", "config.yaml"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
EXPECTED = "a directory of Hugging Face or of a run, with a model of a family that fnrecipe has"
_MAX_BYTES = 16 << 20


@attrs.frozen
class Described:
    """What a directory says of its model.

    source     the file that says it
    family     the name of the family, and `config` the shape in it
    dtype      of the weights, by the name of `model.dtype`; empty if that file does not tell
    tokenizer  values of the section `tokenizer`; none if there is no tokenizer
    """

    source: str
    family: str
    config: ModelConfig
    dtype: str
    tokenizer: Mapping[str, object]


def is_directory(path: str) -> bool:
    return Path(expanded(path)).is_dir()


def is_hugging_face(path: str) -> bool:
    return (Path(expanded(path)) / HUGGING_FACE).is_file()


def _how_to_fetch(path: str) -> str:
    """What brings a model here, if `path` may be its name on a hub."""
    owner, _, name = path.partition("/")
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and not Path(owner).exists()
    return f"; if it is the name of a model on a hub: hf download {path} --local-dir {name}" if is_name else ""


def describe(path: str, families: Kind[Family[ModelConfig]]) -> Described:
    """What the directory `path` says of its model.

    Raises:
        NotFoundError: if it is not a directory of Hugging Face or of a run, or its model is of no family that is known.
    """
    directory = Path(expanded(path))
    if not directory.is_dir():
        found = "no directory" if directory.exists() else "no such directory"
        raise NotFoundError(EXPECTED, f"{directory}: {found}{_how_to_fetch(path)}")
    try:
        if (directory / HUGGING_FACE).is_file():
            return _hugging_face(directory, families)
        if (directory / RUN).is_file():
            return _run(directory, families)
    except UsageError as error:
        raise NotFoundError(EXPECTED, "; ".join(str(error).splitlines())) from None
    raise NotFoundError(EXPECTED, f"{directory}: neither {HUGGING_FACE} nor {RUN} in it")


def model_types(families: Kind[Family[ModelConfig]]) -> dict[str, str]:
    """The model types of Hugging Face that are known, each with the name of its family."""
    parts = {name: find_component(name, families).hugging_face for name in known(families)}
    return {part.model_type: name for name, part in parts.items() if part is not None}


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        UsageError: if it cannot be read, is no JSON object, or is too large.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(f"{path}: expected at most {_MAX_BYTES >> 20} MiB of JSON, found more")
        found = json.loads(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot read it: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected JSON, found {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def token_text(token: object) -> str:
    """The text of a token in a tokenizer_config.json, where it may stand with its properties; empty if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _hugging_face(directory: Path, families: Kind[Family[ModelConfig]]) -> Described:
    path = directory / HUGGING_FACE
    values = read_json(path)
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        kind = method.get("quant_method", "some kind") if isinstance(method, dict) else method
        raise UsageError(f"{path}: expected weights that are not quantised, found those of quantization_config {kind!r}")
    types, kind = model_types(families), values.get("model_type")
    if not isinstance(kind, str) or kind not in types:
        hint = did_you_mean(str(kind), types)
        raise UsageError(f"{path}: expected a model_type that is known, found {shortened(repr(kind), 60)}; {hint}")
    part = find_component(types[kind], families).hugging_face
    assert part is not None
    try:
        config = part.read_config(values)
    except ConfigError as error:
        raise UsageError(f"{directory}: {error}") from None
    dtype = values.get("dtype", values.get("torch_dtype"))
    return Described(str(path), types[kind], config, str(dtype or ""), _tokenizer_beside(directory))


def _tokenizer_beside(directory: Path) -> dict[str, object]:
    """The tokenizer of a directory of Hugging Face, with its tokens for the ends of a text."""
    if not (directory / TOKENIZER).is_file():
        return {}
    path = directory / TOKENIZER_CONFIG
    told = read_json(path) if path.is_file() else {}
    ends = {name: token_text(told.get(name)) for name in ("bos_token", "eos_token")}
    return {"family": "hf", "path": str(directory / TOKENIZER), **{name: text for name, text in ends.items() if text}}


def _run(directory: Path, families: Kind[Family[ModelConfig]]) -> Described:
    path = directory / RUN
    try:
        layer = yaml.load(path.read_text(encoding="utf-8"), str(path), bounded=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read it: {error}") from None
    values = {key: entry.value for key, entry in layer.items()}
    name = values.get("model.family")
    try:
        family = find_component(name, families)
        written = {key.removeprefix("model.config."): v for key, v in values.items() if key.startswith("model.config.")}
        config = structure(nested(written), family.config())
    except NotFoundError as error:
        raise UsageError(f"{path}: model.family: expected {error.expected}, found {name!r}; {error.hint}") from None
    except ConfigError as error:
        raise UsageError(f"{path}: model.config: {error}") from None
    tokenizer = {key.removeprefix("tokenizer."): v for key, v in values.items() if key.startswith("tokenizer.")}
    return Described(str(path), str(name), config, str(values.get("model.dtype", "")), tokenizer)
