"""Parameters as a GGUF file, by the library `gguf` of llama.cpp's authors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from fnrecipe import nn
from fnrecipe.config import ModelSection, TokenizerSection
from fnrecipe.config.model_dir import TOKENIZER
from fnrecipe.errors import UsageError
from fnrecipe.interop.gguf.vocabulary import vocabulary
from fnrecipe.interop.hugging_face.export import part_of, stored_tensors
from fnrecipe.interop.hugging_face.tokenizer import CHAT_TEMPLATE, TokenizerFiles, tokenizer_files
from fnrecipe.runtime.files import sync
from fnrecipe.tree import Tree

if TYPE_CHECKING:
    import gguf

ARCHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Types of models in `config.json` that are Llamas in shape, and llama.cpp's architectures of them."""

_NO_MERGE = "<no> <merge>"
"""llama.cpp wants a list of merges, and the format has no empty one; the parts of this one are no bytes: it never applies."""


@attrs.frozen
class ExportedGGUF:
    """What was written: tensors, their dtype, bytes of the file, and tokens of the vocabulary."""

    tensors: int
    dtype: str
    size: int
    tokens: int


def export(
    out: Path,
    model: ModelSection,
    tokenizer: TokenizerSection,
    params: Tree,
    *,
    dtype: torch.dtype | None = None,
    name: str = "",
    chat_template: str | None = None,
) -> ExportedGGUF:
    """Writes whole parameters as the GGUF file `out`, which is there complete or not at all.

    Matrices are of `dtype`, or of that of the parameters; vectors are float32, as llama.cpp wants them. A chat template
    is given in the place of the tokenizer's own.

    Raises:
        UsageError: if `out` is there already; if llama.cpp has no such architecture or no such tokenizer; without `gguf`.
    """
    gguf = _library()
    part = part_of(model)
    if part.model_type not in ARCHS:
        raise UsageError(f"model.family: expected one of {', '.join(ARCHS)} for GGUF, found {model.family}")
    if out.exists():
        raise UsageError(f"{out}: expected a file that is not there yet, found one")
    values: dict[str, Any] = part.write_config(model.config)
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        raise UsageError(f"model.config.sliding_window: expected null for GGUF, found {values['sliding_window']}")
    arch, layers = ARCHS[part.model_type], values["num_hidden_layers"]
    known = gguf.get_tensor_name_map(next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == arch), layers)
    temporary = out.with_name(f".{out.name}.tmp")
    writer, count, kept = gguf.GGUFWriter(temporary, arch), 0, "float32"
    _write_shape(writer, values, name or out.stem)
    files = tokenizer_files(tokenizer, model.config.max_seq_len, chat_template)
    tokens = _write_vocabulary(writer, files, tokenizer, values["vocab_size"])
    for stored, tensor in stored_tensors(model, params, dtype):
        kept = str(tensor.dtype).removeprefix("torch.") if tensor.ndim > 1 else kept
        there = known.get_name(stored, try_suffixes=(".weight", ".bias"))
        _add(gguf, writer, there, _interleaved(stored, tensor, _width(values)) if arch == "llama" else tensor)
        count += 1
    if (factors := _rope_factors(values)) is not None:
        _add(gguf, writer, "rope_freqs.weight", factors)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[kept])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync(temporary)
        temporary.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UsageError(f"{out}: cannot write: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return ExportedGGUF(count, kept, out.stat().st_size, tokens)


def _library() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UsageError("--format gguf: expected the package gguf, found none: pip install 'fnrecipe[gguf]'") from None
    return gguf


def _write_shape(writer: gguf.GGUFWriter, values: Mapping[str, Any], name: str) -> None:
    heads, width = values["num_attention_heads"], _width(values)
    writer.add_name(name)
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(values["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])


def _write_vocabulary(writer: gguf.GGUFWriter, files: TokenizerFiles, section: TokenizerSection, size: int) -> int:
    """Tokens, merges, ends of documents and of turns, and the chat template; the number of tokens that the tokenizer has."""
    found = vocabulary(json.loads(files.files[TOKENIZER]), size)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.pattern)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges or [_NO_MERGE])
    writer.add_bos_token_id(files.tokenizer.bos)
    writer.add_eos_token_id(files.tokenizer.eos)
    for token in files.tokenizer.answer_ends - {files.tokenizer.eos}:
        writer.add_eot_token_id(token)
    writer.add_add_bos_token(section.add_bos)
    writer.add_add_eos_token(False)
    if CHAT_TEMPLATE in files.files:
        writer.add_chat_template(files.files[CHAT_TEMPLATE].decode())
    return files.tokenizer.vocab_size


def _interleaved(name: str, tensor: Tensor, width: int) -> Tensor:
    """A projection to queries or keys as llama.cpp's Llama rotates it: dimension 2i pairs with 2i + 1, not i with i + E/2."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.view(-1, 2, width // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(values: Mapping[str, Any]) -> Tensor | None:
    """What llama.cpp divides rotary frequencies by, float32 [E / 2], for those that are scaled as Llama 3.1's are."""
    scaling = values.get("rope_scaling")
    if not scaling:
        return None
    if scaling["rope_type"] != "llama3":
        raise UsageError(f"model.config.rope_scaling: expected Llama 3.1's or null for GGUF, found {scaling['rope_type']}")
    plain = torch.tensor([values["rope_theta"] ** (-i / _width(values)) for i in range(0, _width(values), 2)])
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return plain / nn.llama3_scaled(plain, **{key: scaling[key] for key in keys})


def _width(values: Mapping[str, Any]) -> int:
    width: int = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return width


def _add(gguf: ModuleType, writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
