"""A model that exists, from its files and back into files: against transformers, and trained on."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from fnrecipe.data.open_tokenizer import open_tokenizer
from tests.helpers import end, rows, signal_at, start

TEXT = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
TRAIN = [
    "dataset.max_seq_len=128",
    "dataset.batch_size=2",
    "dataset.num_lanes=2",
    "dataset.valid_fraction=0",
    "gang.num_microbatches=2",
    "regime.num_validation_batches=20",
    "regime.num_sample_tokens=0",
    "regime.publish_metrics_every_n_steps=1",
]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own pages: the first half to train on, the second held out."""
    root, middle = tmp_path_factory.mktemp("corpus"), len(TEXT) // 2
    for name, text in (("train", TEXT[:middle]), ("held", TEXT[middle:])):
        (root / name).mkdir()
        pages = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        (root / name / "pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    return root


def test_the_perplexity_of_a_text_is_that_of_transformers(
    smollm2: Path, reference: transformers.LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2)
    ids = tokenizer.encode(TEXT[: 1 << 15], add_special_tokens=False)[:1023]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert open_tokenizer("hf", str(smollm2 / "tokenizer.json")).encode([text])[0].tolist() == ids
    document = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = float(reference(document, labels=document).loss)
    assert 1 < math.exp(expected) < 40, "sensible weights"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    out = tmp_path / "out.json"
    rows_of = ["--config", "dataset.max_seq_len=1024", "dataset.batch_size=1", "dataset.num_lanes=1", "gang.num_microbatches=1"]
    ended = end(start("evaluate", str(smollm2), "--data", str(tmp_path / "text.jsonl"), "--out", str(out), *rows_of))
    assert ended.status == 0, ended.errors
    assert json.loads(out.read_text())["total"]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prompt", ["The capital of France is", "Once upon a time, in a village by the sea,"])
def test_it_says_what_transformers_says(smollm2: Path, reference: transformers.LlamaForCausalLM, prompt: str) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    said = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    ended = end(start("generate", str(smollm2), "--prompt", prompt, "--temperature", "0", "--max-tokens", "64"))
    assert ended.status == 0, ended.errors
    assert ended.output == tokenizer.decode(said, skip_special_tokens=True) + "\n"


def test_imported_and_exported_tensors_have_their_bytes(smollm2: Path, tmp_path: Path) -> None:
    assert end(start("model", "import", str(smollm2), "--out", str(tmp_path / "run"))).status == 0
    assert end(start("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--shard-size", "200MB")).status == 0
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    with safe_open(smollm2 / "model.safetensors", "pt") as before:
        left = set(before.keys())
        for shard in shards:
            with safe_open(shard, "pt") as after:
                for name in after.keys():  # noqa: SIM118
                    assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name
                    left.remove(name)
    assert not left


def test_training_lowers_its_loss_on_other_text(smollm2: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = end(start("train", "lm", "--out", str(out), "--config", *_pairs(smollm2, corpus, steps=50)))
    assert ended.status == 0, ended.errors
    assert _last_loss(out) < _loss_before(smollm2, corpus, tmp_path) - 0.05


def test_two_processes_go_on_from_one_bit_for_bit(smollm2: Path, corpus: Path, tmp_path: Path) -> None:
    pairs = _pairs(smollm2, corpus, steps=6)
    command = ("train", "lm", "--config", *pairs, "--out")
    assert end(start(*command, str(tmp_path / "one"))).status == 0
    stopped = signal_at(start(*command, str(tmp_path / "two"), "--nproc", "2"), tmp_path / "two", 3, signal.SIGTERM)
    assert stopped.status not in (0, 1), stopped.errors
    assert end(start(*command, str(tmp_path / "two"))).status == 0
    first, second = (tmp_path / name / "checkpoints/step_00000006" for name in ("one", "two"))
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert files
    for name in files:
        assert np.array_equal(np.memmap(first / name, np.uint8, "r"), np.memmap(second / name, np.uint8, "r")), name
    shutil.rmtree(tmp_path / "one")


def _pairs(smollm2: Path, corpus: Path, steps: int, rate: float = 5e-5) -> list[str]:
    data = [f"model.path={smollm2}", f"dataset.sources={corpus}/train", f"dataset.valid_sources={corpus}/held"]
    return [
        *data,
        *TRAIN,
        f"regime.num_steps={steps}",
        f"optimizer.config.lr={rate}",
        "lr_scheduler.config.num_warmup_steps=0.1",
    ]


def _loss_before(smollm2: Path, corpus: Path, tmp_path: Path) -> float:
    """The loss on the batches that the run validates on."""
    pairs = _pairs(smollm2, corpus, steps=1, rate=0)
    ended = end(start("train", "lm", "--out", str(tmp_path / "before"), "--config", *pairs))
    assert ended.status == 0, ended.errors
    return _last_loss(tmp_path / "before")


def _last_loss(out: Path) -> float:
    loss: float = rows(out / "metrics/valid.jsonl")[-1]["valid/loss"]
    return loss
