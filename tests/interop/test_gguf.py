"""GGUF files, read back by the library of llama.cpp's authors and by transformers, which undoes llama.cpp's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import fnrecipe
from fnrecipe import tree
from fnrecipe.config import ModelSection, TokenizerSection, resolve, structure
from fnrecipe.errors import UsageError
from fnrecipe.interop.gguf.export import export
from fnrecipe.interop.gguf.vocabulary import PATTERNS, vocabulary
from fnrecipe.models.model import find_model
from fnrecipe.random import key
from fnrecipe.shell.find_recipe import find
from fnrecipe.shell.trained.export import export_gguf, import_model
from tests.helpers import WORDS
from tests.interop.conftest import TEMPLATE
from tests.interop.reading import read, section

SHAPE = {
    "vocab_size": 300,
    "max_seq_len": 32,
    "model_dim": 32,
    "num_layers": 2,
    "num_attn_heads": 4,
    "num_key_value_heads": 2,
    "ffn_inner_dim": 48,
    "tied_embeddings": False,
}


@pytest.fixture(scope="module")
def run(saved: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 0 of the tied model with a tokenizer of its own."""
    lm, out = find("lm").load(), tmp_path_factory.mktemp("gguf") / "tied"
    pairs = [f"model.path={saved / 'tied'}", f"dataset.sources={texts}", "dataset.max_seq_len=32", "gang.device=cpu"]
    import_model(lm, resolve(lm.config, pairs=pairs)[0], out)
    return out


def field(reader: GGUFReader, name: str) -> Any:
    return reader.get_field(name).contents()


def test_transformers_reads_the_same_weights_and_shape(saved: Path, run: Path, tmp_path: Path) -> None:
    made = export_gguf(run, tmp_path / "tied.gguf")
    assert (made.dtype, made.tokens, made.size) == ("float32", 280, (tmp_path / "tied.gguf").stat().st_size)

    expected = transformers.AutoModelForCausalLM.from_pretrained(saved / "tied").eval()
    read = load_gguf_checkpoint(str(tmp_path / "tied.gguf"), return_tensors=True, model_to_load=expected)
    weights = {name: tensor for name, tensor in expected.state_dict().items() if name != "lm_head.weight"}
    assert read["tensors"].keys() == weights.keys()
    for name, tensor in read["tensors"].items():
        assert torch.equal(torch.as_tensor(tensor), weights[name]), name
    shape = {name: read["config"][name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    assert shape == {name: getattr(expected.config, name) for name in shape}
    assert read["config"]["rms_norm_eps"] == pytest.approx(expected.config.rms_norm_eps)


def test_the_vocabulary_is_that_of_the_tokenizer(saved: Path, run: Path, tmp_path: Path) -> None:
    export_gguf(run, tmp_path / "tied.gguf", dtype="bfloat16")
    reader, content = GGUFReader(tmp_path / "tied.gguf"), json.loads((saved / "tied/tokenizer.json").read_text())
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert tokens[:280] == sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    assert (len(tokens), set(kinds[280:]), kinds[:3]) == (288, {5}, [3, 3, 1])
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in content["model"]["merges"]]
    assert (field(reader, "tokenizer.ggml.bos_token_id"), field(reader, "tokenizer.ggml.eos_token_id")) == (1, 0)
    assert (field(reader, "tokenizer.ggml.pre"), field(reader, "tokenizer.chat_template")) == ("gpt-2", TEMPLATE)
    kinds_of = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds_of["blk.0.attn_q.weight"] == "BF16"
    assert kinds_of["blk.0.attn_norm.weight"] == "F32"
    ours = fnrecipe.load(run).recipe.tokenizer(fnrecipe.load(run).config)  # type: ignore[misc]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tied.gguf")
    text = " ".join(WORDS)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode([text])[0].tolist()


def test_the_end_of_a_turn_is_told_where_it_is_not_that_of_a_document(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = section(saved / "tied"), TokenizerSection("hf", str(saved / "tied"))
    found = {}
    for end in ("<|end|>", "<|begin|>"):
        template = TEMPLATE.replace("eos_token", f"'{end}'")
        export(tmp_path / f"{end}.gguf", model, tokenizer, read(saved / "tied"), chat_template=template)
        found[end] = GGUFReader(tmp_path / f"{end}.gguf").get_field("tokenizer.ggml.eot_token_id")
    assert found["<|end|>"] is None
    assert found["<|begin|>"].contents() == 1


@pytest.mark.parametrize(
    ("family", "more"), [("qwen2", {}), ("qwen3", {"head_dim": 16}), ("mistral", {"sliding_window": None})]
)
def test_other_families_are_read_as_the_same_weights(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    model = ModelSection(family=family, config=find_model(family).config(**SHAPE, **more))
    params = find_model(family).init(model.config, key(0), lambda path, leaf: leaf + 0.1 * torch.randn_like(leaf))
    export(tmp_path / "x.gguf", model, TokenizerSection(), params)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert field(reader, "general.architecture") == ("llama" if family == "mistral" else family)
    stored = {tensor.name: np.array(tensor.data).reshape(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    assert len(stored) == len(tree.leaves(params))
    query = params["layers"]["1"]["query"].numpy()
    if family == "mistral":
        query = query.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
    assert np.array_equal(stored["blk.1.attn_q.weight"], query)
    assert np.array_equal(stored["output.weight"], params["head"].numpy())
    assert field(reader, "tokenizer.ggml.merges") == ["<no> <merge>"]


def test_scaled_rotary_frequencies_are_factors_of_the_plain_ones(tmp_path: Path) -> None:
    family = find_model("llama")
    config = structure(
        {
            **SHAPE,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        family.config(),
    )
    params = family.init(config, key(0), lambda path, leaf: leaf)
    export(tmp_path / "x.gguf", ModelSection(config=config), TokenizerSection(), params)
    factors = next(tensor.data for tensor in GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "rope_freqs.weight")
    for number, factor in enumerate(factors):  # Llama 3.1's rule, by wave lengths
        length = 2 * math.pi / 10_000 ** (-2 * number / 8)
        kept = min(max((16 / length - 1) / (4 - 1), 0), 1)
        assert factor == pytest.approx(1 / ((1 - kept) / 8 + kept), rel=1e-5)


def test_what_llama_cpp_has_not_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(UsageError, match="there: expected a file that is not there yet"):
        export_gguf(run, tmp_path / "there")
    other = ModelSection(family="gpt2")
    with pytest.raises(UsageError, match=r"model\.family: expected one of llama, mistral, qwen2, qwen3 for GGUF, found gpt2"):
        export(tmp_path / "x", other, TokenizerSection(), {})
    windowed = ModelSection(family="mistral", config=find_model("mistral").config(**SHAPE, sliding_window=8))
    with pytest.raises(UsageError, match=r"model\.config\.sliding_window: expected null for GGUF, found 8"):
        export(tmp_path / "x", windowed, TokenizerSection(), {})


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}


@pytest.mark.parametrize(("regex", "name"), PATTERNS.items(), ids=PATTERNS.values())
def test_patterns_are_named_as_llama_cpp_names_them(regex: str, name: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    content = {"model": MODEL, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTES]}}
    assert vocabulary(content, 3).pattern == name
    split["pattern"] = {"Regex": regex + "x"}
    with pytest.raises(UsageError, match=r"pre_tokenizer: expected one that llama\.cpp has, .* found Split, ByteLevel"):
        vocabulary(content, 3)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": {**MODEL, "type": "Unigram"}}, "model.type: expected a byte-level BPE for GGUF, found Unigram"),
        ({"model": {**MODEL, "byte_fallback": True}}, "found BPE with byte_fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer: expected none, or NFC, for GGUF, found Lowercase"),
        ({"pre_tokenizer": None}, "found none"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        vocabulary({"model": MODEL, "pre_tokenizer": {**BYTES, "use_regex": True}, **changes}, 3)


def test_the_library_has_the_architectures() -> None:
    assert {"llama", "qwen2", "qwen3"} <= set(gguf.MODEL_ARCH_NAMES.values())
