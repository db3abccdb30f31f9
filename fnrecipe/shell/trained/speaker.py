"""A model that can speak, from the directory of a run or of Hugging Face: parameters, tokenizer, and what ends an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch

from fnrecipe import random, tree
from fnrecipe.compiler import cuda_graph, interpreter
from fnrecipe.compiler.inductor import in_one_piece
from fnrecipe.compiler.packed import packed_weights
from fnrecipe.config import ModelSection, ShellConfig, TokenizerSection
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.config.structure import structure
from fnrecipe.data import Tokenizer
from fnrecipe.data.chat_template import ChatTemplate, read_chat_template
from fnrecipe.data.tokenizer_file import ends
from fnrecipe.data.tokenizer_file import read as tokenizer_file
from fnrecipe.errors import UsageError
from fnrecipe.generation.answer import Answer, Stops
from fnrecipe.generation.answers import answers as answers_of
from fnrecipe.generation.generator import Generator, Prompt, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.generation.uncached import cached_by
from fnrecipe.interop import pretrained
from fnrecipe.interop.survey import describe_model
from fnrecipe.models.model import find_model
from fnrecipe.parallel.mesh import replicated
from fnrecipe.runtime import capacity
from fnrecipe.runtime.files import read
from fnrecipe.shell.trained.load import Weights, is_model_dir, load
from fnrecipe.streams import tokenizer_of
from fnrecipe.tree import Tree

_MAX_BYTES = 1 << 20
_GENERATION = "generation_config.json"


@attrs.frozen(eq=False)
class Speaker:
    """
    path       the directory
    model      family and shape
    add_bos    whether a text begins with BOS
    ends       the tokens that end what it says
    templates  the file of its chat template, or the directory in which one may lie; None if there is no such place
    """

    path: Path
    model: ModelSection
    params: Tree
    tokenizer: Tokenizer
    add_bos: bool
    ends: frozenset[int]
    templates: Path | None

    @property
    def context(self) -> int:
        return self.model.config.max_seq_len

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, BOS first."""
        ids: list[int] = self.tokenizer.encode([text])[0].tolist()
        return [self.tokenizer.bos] * self.add_bos + ids


def open_speaker(
    path: Path, *, dtype: str | None = None, device: torch.device | None = None, weights: Weights = "latest"
) -> Speaker:
    """The model in a directory of Hugging Face or of a run; `dtype`: that of its parameters, its own by default.

    `weights`: which parameters of a run, as `load` takes it.

    Raises:
        UsageError, CheckpointError: if there is no model with a tokenizer, or it cannot be read.
    """
    speaker = _of_hugging_face(path, dtype) if is_model_dir(str(path), weights) else _of_run(path, weights)
    wanted = None if dtype is None else getattr(torch, dtype)
    params = tree.map(lambda leaf: leaf.to(dtype=wanted, device=device), speaker.params)
    return attrs.evolve(speaker, params=params)


def _of_hugging_face(path: Path, dtype: str | None) -> Speaker:
    described = describe_model(str(path))
    if not described.tokenizer:
        raise UsageError(f"{path}: expected a tokenizer.json beside config.json, found none")
    model = ModelSection(path=str(path), dtype="bfloat16" if (dtype or described.dtype) == "bfloat16" else "float32")
    section = structure(dict(described.tokenizer), TokenizerSection())
    tokenizer = tokenizer_of(section)
    params = pretrained(model, random.key(0), replicated)
    return Speaker(path, model, params, tokenizer, _adds_bos(path, tokenizer), _ends(path, tokenizer), path)


def _of_run(path: Path, weights: Weights) -> Speaker:
    recipe, config, params = load(path, weights=weights)
    model, section = getattr(config, "model", None), getattr(config, "tokenizer", None)
    if not isinstance(model, ModelSection):
        raise UsageError(f"{path}: expected a recipe with a section model, found {recipe.name}, which has none")
    if recipe.tokenizer is None or not isinstance(section, TokenizerSection):
        raise UsageError(f"{path}: expected a recipe with a tokenizer, found {recipe.name}, which has none")
    tokenizer = recipe.tokenizer(config)
    spoken, templates = recipe.model(config, params), templates_of(config, section)
    return Speaker(path, model, spoken, tokenizer, section.add_bos, tokenizer.answer_ends, templates)


def templates_of(config: ShellConfig, section: TokenizerSection) -> Path | None:
    """Where the chat template of a run is: that which its examples were written by, or beside its tokenizer."""
    if (own := getattr(config.dataset, "chat_template", None)) is not None:
        return Path(own)
    place = None if section.path is None else Path(section.path)
    return place if place is None or place.is_dir() else place.parent


def _json(path: Path) -> Mapping[str, object]:
    """The JSON object in a file; empty if there is none."""
    try:
        values = json.loads(read(path, _MAX_BYTES)) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot read it: {error}") from None
    return values if isinstance(values, dict) else {}


def _adds_bos(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether texts of the directory's tokenizer begin with BOS: what its post-processor or its config says."""
    told = _json(path / "tokenizer_config.json").get("add_bos_token")
    before, _ = ends(tokenizer_file(str(path / "tokenizer.json")).get("post_processor"))
    return tokenizer.names[0] in before if told is None else bool(told)


def _ends(path: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """EOS, and what generation_config.json says beside it."""
    told = _json(path / _GENERATION).get("eos_token_id")
    ids = told if isinstance(told, list) else [told]
    return frozenset({tokenizer.eos, *(number for number in ids if type(number) is int)})


def chat_template(speaker: Speaker, given: Path | None) -> ChatTemplate:
    """The chat template that is given, or that of the speaker.

    Raises:
        UsageError: if there is none.
    """
    found = given or speaker.templates
    if found is None or not found.exists():
        where = "" if found is None else f" at {found}"
        raise UsageError(f"{speaker.path}: expected a chat template, found none{where}; give one by --chat-template")
    return read_chat_template(str(found))


def generator_of(speaker: Speaker, sampling: Sampling, *, compiled: bool = False, many: bool = False) -> Generator[ModelConfig]:
    """The functions that generate, in the dtype of the parameters; the step is `compiled`, or run operation by operation.

    many  whether there are several batches of prompts, so that it pays to trace what is done with them
    """
    device = tree.leaves(speaker.params)[0].device
    traced = packed_weights() if device.type == "cpu" and _is_small(speaker.params) else interpreter
    backend = in_one_piece if compiled else traced
    return make_generator(
        cached_by(find_model(speaker.model.family)),
        speaker.model.config,
        sampling,
        context=speaker.context,
        vocab_size=min(speaker.tokenizer.vocab_size, speaker.model.config.vocab_size),
        dtype=tree.leaves(speaker.params)[0].dtype,
        backend=backend,
        prompts=traced if many else None,
        captured=cuda_graph(backend) if device.type == "cuda" else None,
    )


def _is_small(params: Tree) -> bool:
    """Whether a second copy of the parameters is nothing to the memory of the machine."""
    size: int = sum(leaf.nbytes for leaf in tree.leaves(params))
    return 4 * size <= (capacity.memory() or 0)


def answers(
    speaker: Speaker,
    generator: Generator[ModelConfig],
    prompts: Sequence[Prompt],
    seed: int,
    *,
    max_tokens: int | None = None,
    strings: Sequence[str] = (),
) -> Iterator[tuple[Answer, ...]]:
    """What is said after each prompt, after each step; ends when all have ended."""
    device, stops = tree.leaves(speaker.params)[0].device, Stops(speaker.ends, tuple(strings))
    return answers_of(generator, speaker.params, prompts, random.key(seed, device), speaker.tokenizer.decode, stops, max_tokens)
