"""What a directory holds of a model, as it is told before anything is read of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from fnrecipe import checkpoint, tree
from fnrecipe.config.find import NotFoundError
from fnrecipe.config.model_dir import Described, describe, is_hugging_face
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.data import huggingface_tokenizer
from fnrecipe.data.tokenizer import describe as describe_tokenizer
from fnrecipe.errors import CheckpointError, UsageError
from fnrecipe.interop.hugging_face.directory import dtype_of
from fnrecipe.interop.hugging_face.weights import find, init_outline
from fnrecipe.models.model import find_model


@attrs.frozen
class Survey:
    """A model in a directory.

    described   its family and config, and the file that says so
    parameters  how many it has
    dtype       of the weights, by torch's name; empty if they cannot be looked at
    files       the files of the weights and their bytes
    tokenizer   a word on its tokenizer; empty if there is none beside it
    problems    what is wrong with it, a line each
    """

    described: Described
    parameters: int
    dtype: str
    files: Mapping[str, int]
    tokenizer: str
    problems: Sequence[str]


def describe_model(path: str) -> Described:
    """What the directory `path` says of its model.

    Raises:
        UsageError: if it holds none that is known.
    """
    try:
        return describe(path, FAMILIES)
    except NotFoundError as error:
        raise UsageError(f"{path}: expected {error.expected}; {error.hint}") from None


def survey(path: str) -> Survey:
    """What the directory `path`, of Hugging Face or of a run, holds.

    Raises:
        UsageError: if it holds no model that is known.
    """
    described = describe_model(path)
    config, directory = described.config, Path(path)
    leaves = tree.leaves(init_outline(find_model(described.family), config))
    parameters = sum(leaf.numel() for leaf in leaves)
    dtype, files, problems = described.dtype, dict[str, int](), list[str]()
    try:
        dtype, files = _weights(directory, described)
    except (UsageError, CheckpointError) as error:
        problems += str(error).splitlines()
    tokenizer, wrong = _tokenizer(described)
    return Survey(described, parameters, dtype, files, tokenizer, [*problems, *wrong])


def _weights(directory: Path, described: Described) -> tuple[str, dict[str, int]]:
    """The dtype of the weights, and the bytes of their files by name."""
    if not is_hugging_face(str(directory)):
        found = checkpoint.of_run(directory, warn=lambda text: None)
        names = dict.fromkeys(name for saved in found.tensors.values() for name in saved.slices)
        return described.dtype, {f"{found.directory.name}/{name}": (found.directory / name).stat().st_size for name in names}
    model, config = find_model(described.family), described.config
    held = find(directory, model, config, init_outline(model, config)).held
    names = dict.fromkeys(tensor.file for tensor in held.values())
    return dtype_of(held), {name: (directory / name).stat().st_size for name in names}


def _tokenizer(described: Described) -> tuple[str, list[str]]:
    """A word on the tokenizer of a directory, and what is wrong with it."""
    values, size = described.tokenizer, described.config.vocab_size
    if values.get("family") != "hf":
        return str(values.get("family", "")), []
    ends = [None if (name := values.get(key)) is None else str(name) for key in ("eos_token", "bos_token")]
    try:
        tokenizer = huggingface_tokenizer(str(values["path"]), *ends)
    except UsageError as error:
        return "", [str(error)]
    more = f"{values['path']}: expected at most model.config.vocab_size = {size} tokens, found {tokenizer.vocab_size}"
    return describe_tokenizer(tokenizer), [more] if tokenizer.vocab_size > size else []


def weights_dtype(path: str) -> str:
    """The value of `model.dtype` that keeps every number of the weights in a directory.

    Raises:
        UsageError, CheckpointError: if they cannot be read, or are not those of its config.
    """
    found = survey(path)
    if found.problems:
        raise UsageError("\n".join(found.problems))
    return found.dtype if found.dtype == "bfloat16" else "float32"
