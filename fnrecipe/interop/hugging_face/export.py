"""Parameters as a directory of Hugging Face: safetensors files, `config.json`, and what else its readers look for."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import safetensors.torch
import torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.config import ModelSection, TokenizerSection
from fnrecipe.config.model_dir import HUGGING_FACE, read_json
from fnrecipe.config.sections.model import ModelConfig
from fnrecipe.data import Tokenizer
from fnrecipe.errors import UsageError, few
from fnrecipe.interop.hugging_face.directory import INDEX, WEIGHTS
from fnrecipe.interop.hugging_face.names import places
from fnrecipe.interop.hugging_face.tokenizer import TokenizerFiles, pretty, tokenizer_files
from fnrecipe.interop.hugging_face.weights import init_outline
from fnrecipe.models.hugging_face import HuggingFace, Stored
from fnrecipe.models.model import find_family, find_model
from fnrecipe.runtime.files import sync
from fnrecipe.tree import Tree

GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@attrs.frozen
class Exported:
    """What was written: parameters, their dtype, files of weights and the bytes in them, tokens of the tokenizer."""

    parameters: int
    dtype: str
    files: int
    size: int
    tokens: int


def export(
    out: Path,
    model: ModelSection,
    tokenizer: TokenizerSection,
    params: Tree,
    *,
    dtype: torch.dtype | None,
    shard_size: int,
    replace: bool = False,
    chat_template: str | None = None,
) -> Exported:
    """Writes whole parameters as the directory `out`, which is there complete or not at all.

    dtype       to which parameters are cast; None: as they are
    shard_size  bytes of a file of weights at most, unless a single tensor has more
    replace     whether a directory that is there gives way
    chat_template  in the place of the tokenizer's own; None: that one

    Raises:
        UsageError: if `out` is there already, the family has no form of Hugging Face, the parameters are not those of the
            family, or one is too large for `dtype`.
    """
    part, leaves = part_of(model), _checked(model, params)
    found = tokenizer_files(tokenizer, model.config.max_seq_len, chat_template)
    stored = places(part, model.config, list(leaves))
    names = _by_name(stored)
    sizes = {name: sum(_bytes(leaves[path], dtype) for path in paths) for name, paths in names.items()}
    shards = _shards(sizes, shard_size)
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    with written(out, replace=replace) as folder:
        for file, shard in zip(files, shards, strict=True):
            tensors = {name: _joined(name, {path: leaves[path] for path in names[name]}, stored, dtype) for name in shard}
            save(folder / file, tensors)
        if len(shards) > 1:
            places_of = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places_of.items()))}
            (folder / INDEX).write_bytes(pretty(index))
        kept = _name(dtype or _common_dtype(list(leaves.values())))
        for name, data in {**_configs(model, part, found, kept), **found.files}.items():
            (folder / name).write_bytes(data)
    count = sum(leaf.numel() for leaf in leaves.values())
    return Exported(count, kept, len(files), sum(sizes.values()), found.tokenizer.vocab_size)


def stored_tensors(model: ModelSection, params: Tree, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters as the tensors of a directory, by their names, cast to `dtype` if it is given.

    Raises:
        UsageError: as `export`.
    """
    leaves = _checked(model, params)
    stored = places(part_of(model), model.config, list(leaves))
    for name, paths in _by_name(stored).items():
        yield name, _joined(name, {path: leaves[path] for path in paths}, stored, dtype)


def _by_name(stored: Mapping[str, Stored]) -> dict[str, list[str]]:
    """The parameters that are parts of each tensor."""
    names: dict[str, list[str]] = {}
    for path, place in stored.items():
        names.setdefault(place.name, []).append(path)
    return names


def part_of(model: ModelSection) -> HuggingFace[ModelConfig]:
    """The form of Hugging Face of a family.

    Raises:
        UsageError: if it has none.
    """
    part: HuggingFace[ModelConfig] | None = find_family(model.family).hugging_face
    if part is None:
        raise UsageError(f"model.family: expected a family that transformers has a model of, found {model.family}")
    return part


def _checked(model: ModelSection, params: Tree) -> dict[str, Tensor]:
    """The parameters by their paths."""
    outline = init_outline(find_model(model.family), model.config)
    wanted = {path: tuple(leaf.shape) for path, leaf in tree.paths(outline).items()}
    leaves: dict[str, Tensor] = tree.paths(params)
    if {path: tuple(leaf.shape) for path, leaf in leaves.items()} != wanted:
        other = [path for path in {**wanted, **leaves} if path not in leaves or tuple(leaves[path].shape) != wanted.get(path)]
        raise UsageError(f"expected the parameters of model.family={model.family}, found others: {few(other)}")
    return leaves


def _joined(name: str, parts: Mapping[str, Tensor], stored: Mapping[str, Stored], dtype: torch.dtype | None) -> Tensor:
    """The tensor `name`, of the parameters that are its parts."""
    ordered = [leaf for _, leaf in sorted(parts.items(), key=lambda item: stored[item[0]].part)]
    whole = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
    transposed = next(iter(stored[path].transposed for path in parts))
    cast = (whole.t() if transposed else whole).to(dtype or whole.dtype).contiguous()
    if not cast.isfinite().all() and whole.isfinite().all():
        raise UsageError(f"{name}: expected numbers that {_name(cast.dtype)} can hold, found {whole.abs().max().item():g}")
    return cast


def _configs(model: ModelSection, part: HuggingFace[ModelConfig], tokenizer: TokenizerFiles, dtype: str) -> dict[str, bytes]:
    """`config.json` and `generation_config.json`; ids and generation as they were where the tokenizer came with a model."""
    ids: dict[str, object] = {"bos_token_id": tokenizer.tokenizer.bos, "eos_token_id": tokenizer.tokenizer.eos}
    generation = pretty(_stopping({"_from_model_config": True, **ids}, tokenizer.tokenizer))
    if tokenizer.origin is not None and (tokenizer.origin / HUGGING_FACE).is_file():
        before = read_json(tokenizer.origin / HUGGING_FACE)
        ids |= {key: before[key] for key in _IDS if before.get(key) is not None}
        if (tokenizer.origin / GENERATION).is_file():
            generation = pretty(_stopping(read_json(tokenizer.origin / GENERATION), tokenizer.tokenizer))
    head = {"architectures": [part.architecture], "model_type": part.model_type, "dtype": dtype, "torch_dtype": dtype}
    return {HUGGING_FACE: pretty({**head, **part.write_config(model.config), **ids}), GENERATION: generation}


def _stopping(generation: dict[str, object], tokenizer: Tokenizer) -> dict[str, object]:
    """What says how to generate, which stops at what ends the tokenizer's answers beside EOS, too."""
    told = generation.get("eos_token_id")
    known = told if isinstance(told, list) else [] if told is None else [told]
    others = sorted(tokenizer.answer_ends.difference([*known, tokenizer.eos]))
    kept = {key: value for key, value in generation.items() if key != "_from_model_config"}
    return {**kept, "eos_token_id": [*known, *others]} if others else generation


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in runs of at most `limit` bytes, in their order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("xb") as file:  # the library makes files that only their owner may read, whatever the umask says
        mode = os.fstat(file.fileno()).st_mode
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))


@contextmanager
def written(out: Path, *, replace: bool) -> Iterator[Path]:
    """A directory beside `out` to write in, which takes its place once all is written and on disk.

    Raises:
        UsageError: if `out` is there and not empty, or cannot be written.
    """
    if not replace and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: expected a directory that is not there yet, found one, or a file")
    tmp, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    try:
        for left in (tmp, old):
            shutil.rmtree(left, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        for path in [*tmp.iterdir(), tmp]:
            sync(path)
        if replace and out.exists():
            out.rename(old)
        tmp.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _bytes(leaf: Tensor, dtype: torch.dtype | None) -> int:
    return leaf.numel() * (dtype or leaf.dtype).itemsize


def _common_dtype(leaves: Sequence[Tensor]) -> torch.dtype:
    found = {leaf.dtype for leaf in leaves}
    return found.pop() if len(found) == 1 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
