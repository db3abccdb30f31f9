"""The models that the train step is measured on, and their batches: 8 rows of 256 tokens. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import numpy as np

from fnrecipe.config import DataSource
from fnrecipe.data import Batch, LaneAssignment, byte_tokenizer, open_corpus
from fnrecipe.data.corpus import texts_of
from fnrecipe.data.huggingface import train_bpe
from fnrecipe.data.tokenizer import END_OF_TEXT
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.recipes.lm.data import train_stream

VOCABULARY, MAX_LENGTH = 8192, 20_000


@attrs.frozen
class Case:
    """A model, the tokens it is fed with, and how many steps are timed behind a first one."""

    config: LlamaConfig
    tokens: str
    num_steps: int


def llama_config(
    vocab_size: int, length: int, dim: int, layers: int, heads: int, groups: int, inner: int, *, tied: bool = False
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        max_seq_len=length,
        model_dim=dim,
        num_layers=layers,
        num_attn_heads=heads,
        num_key_value_heads=groups,
        ffn_inner_dim=inner,
        tied_embeddings=tied,
    )


assert isinstance(defaults.model.config, LlamaConfig)
CASES = {
    "3M, bytes": Case(defaults.model.config, "bytes", 8),
    "7M": Case(llama_config(VOCABULARY, 256, 256, 4, 4, 4, 688), "bpe", 8),
    "34M": Case(llama_config(VOCABULARY, 256, 512, 8, 8, 8, 1376), "bpe", 4),
    "134M": Case(llama_config(32_000, 256, 768, 12, 12, 12, 2048), "bpe", 2),
}


def byte_batches(number: int) -> list[Batch]:
    return _first(defaults, number)


def write(folder: Path) -> None:
    """The batches of all cases, as `read` finds them."""
    number = 1 + max(case.num_steps for case in CASES.values())
    write_text(folder)
    bpe = attrs.evolve(
        defaults,
        model=attrs.evolve(defaults.model, config=CASES["7M"].config),
        dataset=attrs.evolve(defaults.dataset, sources=(DataSource(str(folder / "text.jsonl")),)),
        tokenizer=attrs.evolve(defaults.tokenizer, family="hf", path=str(folder / "tokenizer.json")),
    )
    for name, batches in (("bytes", byte_batches(number)), ("bpe", _first(bpe, number))):
        fields = {field.name: np.stack([getattr(batch, field.name) for batch in batches]) for field in attrs.fields(Batch)}
        np.savez(folder / name, allow_pickle=False, **fields)


def read(case: Case, folder: Path) -> list[Batch]:
    with np.load(folder / f"{case.tokens}.npz") as arrays:
        return [Batch(**{key: arrays[key][number] for key in arrays.files}) for number in range(1 + case.num_steps)]


def write_text(folder: Path) -> None:
    """text.jsonl, every second short top-level piece of Python's library, and tokenizer.json, a BPE trained on them."""
    stdlib = open_corpus("stdlib:", byte_tokenizer())
    pieces = [piece for text in texts_of(stdlib) for piece in text.split("\n\n\n")]
    texts = [piece for piece in pieces if 0 < len(piece.strip()) < MAX_LENGTH][::2]
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train_bpe(iter(texts), VOCABULARY, [END_OF_TEXT], show_progress=False).save(str(folder / "tokenizer.json"))


def _first(config: LMConfig, number: int) -> list[Batch]:
    stream = train_stream(config, LaneAssignment())(None)
    return [next(stream)[0] for _ in range(number)]
