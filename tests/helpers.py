"""What several tests need: a tiny model, packed batches, the equality of trees, and tiny runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.build import to_host
from fnrecipe.data import Batch, Tokens, collate
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.tree import Tree
from tests.zygote import ENVIRONMENT, zygote

compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
"""Marks a test that imports Inductor, which still uses that."""

WORDS = ["the", "of", "a", "fold", "state", "step", "key", "leaf", "tree", "stream", "batch", "lane", "loss", "rate", "seed"]
TINY = LlamaConfig(
    vocab_size=64,
    max_seq_len=32,
    model_dim=32,
    num_layers=2,
    num_attn_heads=4,
    num_key_value_heads=2,
    ffn_inner_dim=48,
    tied_embeddings=True,
)


def documents(*lengths: int, vocab_size: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Random documents with so many predictions each: one token more."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length + 1) for length in lengths]


def packed(rows: Sequence[Sequence[np.ndarray]], length: int) -> Batch:
    """The batch, as tensors, of rows of documents."""
    return tensors([[Tokens(ids, len(ids)) for ids in row] for row in rows], length)


def tensors(rows: Sequence[Sequence[Tokens]], length: int) -> Batch:
    """The batch, as tensors, of rows of pieces."""
    return to_host(collate(rows, length), torch.device("cpu"))


def write_texts(root: Path) -> None:
    """Two JSONL files of short documents in the directory `root`."""
    root.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name in ("a.jsonl", "b.jsonl"):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(120)]
        (root / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def draw(like: Tree, seed: int) -> Tree:
    """Normal numbers in the structure, shapes and dtypes of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator).to(leaf.dtype), like)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def assert_same_bits(found: Tree, expected: Tree) -> None:
    """Same structure, dtypes, shapes and bits."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    others = tree.paths(expected)
    different = [path for path, leaf in tree.paths(found).items() if bits(leaf) != bits(others[path])]
    assert not different


def assert_close(found: Tree, expected: Tree, tolerance: float) -> None:
    """Same structure and shapes; each leaf within `tolerance` times its largest entry."""
    others = tree.paths(expected)
    assert tree.paths(found).keys() == others.keys()
    for path, leaf in tree.paths(found).items():
        error, scale = (leaf - others[path]).abs().max(), others[path].abs().max()
        assert leaf.shape == others[path].shape, path
        assert error <= tolerance * scale, f"{path}: off by {error:.2e} where the largest entry is {scale:.2e}"


def layout(value: Tree) -> Any:
    """Structure, dtypes and shapes."""
    return pytree.tree_structure(value), [(leaf.dtype, leaf.shape) for leaf in tree.leaves(value)]


def pairs(texts: Path, **changes: Any) -> list[str]:
    """Config pairs of a tiny run, with `changes` as `section__key=value`; no interval divides another."""
    values: Mapping[str, Any] = {
        "model__config": "{vocab_size: 264, max_seq_len: 32, model_dim: 32, num_layers: 2, num_attn_heads: 4, "
        "num_key_value_heads: 2, ffn_inner_dim: 64, tied_embeddings: true}",
        "dataset__sources": f"[{{path: {texts}}}]",
        "dataset__valid_fraction": 0.2,
        "dataset__max_seq_len": 32,
        "dataset__batch_size": 8,
        "dataset__num_lanes": 4,
        "dataset__pack_window": 8,
        "gang__device": "cpu",
        "gang__num_microbatches": 2,
        "lr_scheduler__config__num_warmup_steps": 3,
        "regime__num_steps": 30,
        "regime__checkpoint_every_n_steps": 4,
        "regime__validate_every_n_steps": 7,
        "regime__publish_metrics_every_n_steps": 3,
        "regime__num_validation_batches": 2,
        "regime__num_sample_tokens": 4,
        "common__torch__num_threads": 1,
        "common__metric_recorders__tensorboard__enabled": "false",
        **changes,
    }
    return [f"{name.replace('__', '.')}={value}" for name, value in values.items()]


@attrs.frozen
class Ended:
    """What is left of a process."""

    status: int
    output: str
    errors: str


def start(*args: str, fresh: bool = False, **options: Any) -> subprocess.Popen[str]:
    """`fnrecipe ARGS`, of one thread: a fork of this process's zygote, or if `fresh`, a Python of its own.

    `options` are those of Popen; `env` is added to the environment.
    """
    command, pipe = [sys.executable, "-m", "fnrecipe.cli", *args], subprocess.PIPE
    environment = {**os.environ, **ENVIRONMENT, **options.pop("env", {})}
    popen = subprocess.Popen if fresh else zygote()
    return popen(command, **{"stdout": pipe, "stderr": pipe, "text": True, "env": environment, **options})


def end(process: subprocess.Popen[str]) -> Ended:
    output, errors = process.communicate(timeout=600)
    return Ended(process.returncode, output, errors)


def signal_at(process: subprocess.Popen[str], out: Path, step: int, number: int) -> Ended:
    """The process's end by the signal `number`, sent once the metrics show `step`."""
    deadline = time.monotonic() + 300
    while process.poll() is None and last_step(out) < step:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    return end(process)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_step(out: Path) -> int:
    """The last step in the training metrics, whose last line may be torn; 0 if there is none."""
    path = out / "metrics/train.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0


def remains(out: Path) -> dict[str, bytes]:
    """The bytes of all that a run leaves that may not depend on how often it was stopped."""
    checkpoints = sorted(path.relative_to(out) for path in (out / "checkpoints").rglob("*") if path.is_file())
    paths = [*checkpoints, "config.yaml", "metrics/train.jsonl", "metrics/valid.jsonl", "sample.txt"]
    return {str(path): (out / path).read_bytes() for path in paths}
