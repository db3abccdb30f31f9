"""The stream: tokens per CPU second from JSONL to batches, against the tokenizer alone.

The text is the sources of Python's library as JSONL; the tokenizer a byte-level BPE of 8192 tokens trained on it. The bare
system has all texts in memory already and does nothing but `encode_batch` in chunks of 16; fnrecipe reads, parses,
splits off validation documents, tokenises, packs by best fit, shuffles, collates and hands over through its thread.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attrs
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.report import Result, ratios
from benchmarks.workers import take_turns
from fnrecipe.config import DataSource
from fnrecipe.data import Place, pipe, prefetch, python_stdlib, read_files
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.recipes.lm.data import train_stream

BARE = "tokenizers.encode_batch"
VOCABULARY = 8192


def run(rounds: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        _write_case(Path(folder))
        measured = take_turns("stream", [BARE, "fnrecipe"], folder, rounds)
    results = []
    for system, turns in measured.items():
        make = partial(Result, "stream", "stdlib JSONL, BPE 8192", system)
        results.append(make("per CPU second", [t.amount / t.cpu for t in turns], "tokens"))
        results.append(make("per second", [t.amount / t.wall for t in turns], "tokens"))
        results.append(make("peak memory of the process", [turns[-1].peak], "MiB"))
    return results + ratios(results, "per CPU second", BARE)


def setup(system: str, case: str) -> Callable[[], float]:
    return (_bare if system == BARE else _whole)(Path(case))


def _bare(folder: Path) -> Callable[[], float]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open()]

    def work() -> float:
        chunks = (texts[i : i + 16] for i in range(0, len(texts), 16))
        return float(sum(len(e.ids) for chunk in chunks for e in tokenizer.encode_batch(chunk, add_special_tokens=False)))

    return work


def _whole(folder: Path) -> Callable[[], float]:
    config = _config(folder)

    def work() -> float:
        source = pipe(train_stream(config, Place()), partial(prefetch, size=2))
        return float(sum(batch.mask.sum() for batch, _ in source(None)))

    return work


def _config(folder: Path) -> LMConfig:
    dataset = attrs.evolve(
        defaults.dataset, family="jsonl", sources=(DataSource(str(folder / "text.jsonl")),), valid_fraction=0.0
    )
    model = attrs.evolve(defaults.model, config=attrs.evolve(defaults.model.config, vocab_size=VOCABULARY))
    tokenizer = attrs.evolve(defaults.tokenizer, family="hf", path=str(folder / "tokenizer.json"))
    regime = attrs.evolve(defaults.regime, num_data_epochs=1)
    return attrs.evolve(defaults, dataset=dataset, model=model, tokenizer=tokenizer, regime=regime)


def _write_case(folder: Path) -> None:
    """A quarter of the library: enough to measure, and quick to train the tokenizer on."""
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in _texts())
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def _texts() -> Iterator[str]:
    return (text for text, _ in read_files(paths=python_stdlib()[::4]))
