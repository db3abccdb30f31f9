"""Directories of tiny random models as transformers saves them, with and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from fnrecipe.data.huggingface import train_bpe
from tests.helpers import WORDS

SHAPE = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def model_of(*, tied: bool = True, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A Llama whose attention is far from uniform and whose norms are not 1."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied, bos_token_id=257, eos_token_id=256)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_tokenizer(directory: Path, vocab_size: int = 280) -> None:
    special = ["<|end|>", "<|begin|>"]
    trained = train_bpe(iter([" ".join(WORDS)] * 3), vocab_size, special, show_progress=False)
    trained.save(str(directory / "tokenizer.json"))
    begin = {"__type": "AddedToken", "content": "<|begin|>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tied`, `untied`, `sharded` and `bfloat16` models; nothing may change them."""
    root = tmp_path_factory.mktemp("hugging_face")
    model_of().save_pretrained(root / "tied")
    write_tokenizer(root / "tied")
    model_of(tied=False).save_pretrained(root / "untied")
    model_of().save_pretrained(root / "sharded", max_shard_size="20KB")
    model_of().to(torch.bfloat16).save_pretrained(root / "bfloat16")
    return root
