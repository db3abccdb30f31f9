"""The stream: from JSONL to batches, against the tokenizer alone and against other libraries (`pip install -e '.[bench]'`).

The documents are every second top-level piece of the sources of Python's library that is shorter than 20,000 characters;
the tokenizer is a byte-level BPE of 8192 tokens trained on them; batches are 8 rows of 1024. The bare systems have all texts
in memory and only encode them; fnrecipe reads, parses, splits off validation documents, shuffles, tokenises, packs by best
fit, collates and hands over through its thread. The peers (see `stream_peers.py`) read, parse, tokenise, join documents end
to end and batch.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import tokenizers

from benchmarks.cases import VOCABULARY, write_text
from benchmarks.report import Result, ratios
from benchmarks.stream_peers import CHUNK, PEERS
from benchmarks.workers import take_turns
from fnrecipe.config import DataSource
from fnrecipe.data import Batch, LaneAssignment, Source, in_worker_processes, pipe, prefetch
from fnrecipe.data.survey import fill
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.recipes.lm.config import LMConfig
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.streams import example

BARE, FAST = "tokenizers.encode_batch", "tokenizers.encode_batch_fast"
OURS = ("fnrecipe", "fnrecipe, token cache")
WORKERS = {"fnrecipe, a thread": 0, "fnrecipe, 1 process": 1, "fnrecipe, 2 processes": 2}
LENGTH = 1024


def run(rounds: int) -> list[Result]:
    peers = [name for name, (module, _) in PEERS.items() if importlib.util.find_spec(module)]
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        speed = _speed(folder, [BARE, FAST, *OURS, *peers], rounds)
        resume = _cpu(take_turns("stream", [f"{name}@90" for name in (*OURS, *peers)], folder, rounds), "resume at 90 %")
        workers = [
            Result(
                "stream", "workers", name.removesuffix("@workers"), "per second", [t.amount / t.wall for t in turns], "tokens"
            )
            for name, turns in take_turns("stream", [f"{name}@workers" for name in WORKERS], folder, rounds).items()
        ]
        return [*speed, *resume, *workers, *_memory(folder), *_padding(Path(folder))]


def setup(system: str, case: str) -> Callable[[], float]:
    """One round of a system: an epoch of tokens, a resume (`@90`), an epoch by workers (`@workers`), or epochs (`@epochs`)."""
    folder, (name, _, what) = Path(case), system.partition("@")
    if name in (BARE, FAST):
        return _bare(folder, name.removeprefix("tokenizers."))
    if what == "workers":
        return _by_workers(folder, WORKERS[name])
    if what == "epochs":
        source = _ours(folder, cache=False)
        return lambda: float(sum(batch.mask.sum() for batch, _ in source(None)))
    if what == "90":
        return _resume(folder, name)
    read = _reader(folder, name)
    return lambda: float(sum(_tokens(batch) for batch, _ in read(None)))


def _speed(folder: str, systems: list[str], rounds: int) -> list[Result]:
    measured = take_turns("stream", systems, folder, rounds)
    results = []
    for system, turns in measured.items():
        make = partial(Result, "stream", "JSONL, BPE 8192, rows of 1024", system)
        results.append(make("per CPU second", [t.amount / t.cpu for t in turns], "tokens"))
        results.append(make("per second", [t.amount / t.wall for t in turns], "tokens"))
        results.append(make("peak memory of the process", [turns[-1].peak], "MiB"))
    return [*results, *ratios(results, "per CPU second", BARE), *ratios(results, "per CPU second", FAST)]


def _cpu(measured: dict[str, Any], case: str) -> list[Result]:
    return [
        Result("stream", case, name.partition("@")[0], "CPU", [t.cpu for t in turns], "s") for name, turns in measured.items()
    ]


def _memory(folder: str) -> list[Result]:
    """The process's peak memory after each of ten epochs."""
    (turns,) = take_turns("stream", ["fnrecipe@epochs"], folder, 10, warmup=0).values()
    return [
        Result("stream", "10 epochs", "fnrecipe", f"peak memory after epoch {n}", [turns[n - 1].peak], "MiB")
        for n in (1, 5, 10)
    ]


def _padding(folder: Path) -> list[Result]:
    """Of rows from windows of full size."""
    results = []
    for window in (64, 512):
        source = train_stream(_config(folder, window=window, epochs=None), LaneAssignment())
        full = fill(batch for batch, _ in islice(source(None), 1000, 2000))
        padding = 100 * (1 - full.targets / full.positions)
        results.append(Result("stream", "padding", f"window of {window} documents", "of all positions", [padding], "%"))
    return results


def _reader(folder: Path, name: str) -> Callable[[Any], Iterator[tuple[Any, Any]]]:
    if name in OURS:
        return _ours(folder, cache=name != OURS[0])
    return PEERS[name][1](folder, LENGTH)


def _ours(folder: Path, *, cache: bool) -> Source[Batch]:
    config = _config(folder, cache=str(folder / "cache") if cache else None)
    return pipe(train_stream(config, LaneAssignment()), partial(prefetch, size=2))


def _tokens(batch: Any) -> int:
    return int(batch.mask.sum()) if isinstance(batch, Batch) else int(batch.size - len(batch))


def _bare(folder: Path, method: str) -> Callable[[], float]:
    encode = getattr(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), method)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open()]

    def work() -> float:
        chunks = (texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK))
        return float(sum(len(e.ids) for chunk in chunks for e in encode(chunk, add_special_tokens=False)))

    return work


def _resume(folder: Path, name: str) -> Callable[[], float]:
    """Opens the data anew and reads the batch behind the state at 90 % of an epoch, which is found beforehand."""
    read = _reader(folder, name)
    size = sum(1 for _ in read(None))
    _, state = next(islice(read(None), size * 9 // 10, None))
    saved = state if name in OURS else state()

    def work() -> float:
        return float(_tokens(next(_reader(folder, name)(saved))[0]))

    return work


def _by_workers(folder: Path, workers: int) -> Callable[[], float]:
    config = attrs.evolve(_config(folder), dataset=attrs.evolve(_config(folder).dataset, num_readers=2))
    if not workers:
        return setup(OURS[0], str(folder))
    padding = example(config, config.dataset.batch_size // workers)
    made = partial(in_worker_processes, partial(train_stream, config), assignment=LaneAssignment(), padding=padding)
    source = partial(made, workers=workers, size=2)
    return lambda: float(sum(batch.mask.sum() for batch, _ in source(None)))


def _config(folder: Path, *, cache: str | None = None, window: int = 512, epochs: int | None = 1) -> LMConfig:
    dataset = attrs.evolve(
        defaults.dataset,
        sources=(DataSource(str(folder / "text.jsonl")),),
        valid_fraction=0.0,
        max_seq_len=LENGTH,
        pack_window=window,
        cache=cache,
    )
    assert isinstance(defaults.model.config, LlamaConfig)
    model = attrs.evolve(defaults.model, config=attrs.evolve(defaults.model.config, vocab_size=VOCABULARY, max_seq_len=LENGTH))
    tokenizer = attrs.evolve(defaults.tokenizer, family="hf", path=str(folder / "tokenizer.json"))
    regime = attrs.evolve(defaults.regime, num_data_epochs=epochs)
    return attrs.evolve(defaults, dataset=dataset, model=model, tokenizer=tokenizer, regime=regime)
