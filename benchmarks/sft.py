"""Supervised fine-tuning on real instructions: `fnrecipe train sft` against TRL's SFTTrainer, with packing and without.

The same Llama of 10M parameters in float32 on the CPU, one thread, AdamW, clipping, the same prompts and answers cut by the
same BPE, answers alone trained; rows of 512, four a step where they are packed. Each round of each system is a fresh process:
a first step, then those that are timed, with the making of their batches. TRL tokenises and packs before its first step, which
is not in the figures; fnrecipe does so while it trains, which is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch

from benchmarks.cases import llama_config
from benchmarks.report import Result, ratios
from benchmarks.step import ROOT, has_packages
from benchmarks.workers import status

LENGTH, VOCABULARY, STEPS = 512, 8192, 4
CONFIG = llama_config(VOCABULARY, LENGTH, 320, 6, 5, 5, 864, tied=True)
PACKED = {"packing": True, "per_device_train_batch_size": 4}
PADDED = {"per_device_train_batch_size": 8}
SYSTEMS: Mapping[str, Mapping[str, str | int]] = {
    "fnrecipe": {},
    "TRL, packing": PACKED,
    "TRL, packing, a row at a time": {**PACKED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "TRL, without packing": PADDED,
    "TRL, without packing, by length": {**PADDED, "train_sampling_strategy": "group_by_length"},
}
UNITS = {
    "trained per CPU second": "tokens",
    "trained per second": "tokens",
    "tokens per CPU second": "tokens",
    "padding": "%",
    "peak memory of the process": "MiB",
    "loss of the last step": "nats",
}


@attrs.frozen
class Counted:
    """Of a step: the targets that are trained, tokens that are no padding, and positions that are computed."""

    trained: int
    tokens: int
    positions: int


Report: TypeAlias = Callable[[tuple[Counted, float]], object]


def run(rounds: int, directory: Path, pythons: Mapping[str, str] | None = None) -> list[Result]:
    """`directory` is that of LLaMA-Factory's sdist; `pythons` names the Python that has `trl`."""
    trl = (pythons or {}).get("trl", sys.executable)
    systems = [name for name in SYSTEMS if name == "fnrecipe" or has_packages(trl, ("trl", "datasets"))]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        _write(directory, Path(folder))
        for _ in range(rounds):
            for name in systems:
                figures[name].append(_in_process(sys.executable if name == "fnrecipe" else trl, name, folder))
    results = [
        Result("sft", "10M, alpaca", name, metric, [figure[metric] for figure in turns], unit)
        for name, turns in figures.items()
        for metric, unit in UNITS.items()
    ]
    speeds = [row for metric in list(UNITS)[:2] for row in ratios(results, metric, "fnrecipe")]
    missing = [Result("sft", "all", name, "not installed", [], "") for name in SYSTEMS if name not in figures]
    return [*results, *speeds, *missing]


def _write(directory: Path, folder: Path) -> None:
    """train.jsonl, prompts and completions, and the BPE trained on them."""
    from fnrecipe.data.huggingface import train_bpe
    from fnrecipe.data.tokenizer import END_OF_TEXT

    found = json.loads((directory / "data" / "alpaca_en_demo.json").read_text())
    prompts = ["".join(f"{each[key]}\n" for key in ("instruction", "input") if each[key]) for each in found]
    records = [{"prompt": prompt, "completion": each["output"]} for prompt, each in zip(prompts, found, strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = (record["prompt"] + record["completion"] for record in records)
    train_bpe(texts, VOCABULARY, [END_OF_TEXT], show_progress=False).save(str(folder / "tokenizer.json"))


def _in_process(python: str, name: str, folder: str) -> dict[str, float]:
    command = [python, "-m", "benchmarks.sft", name, folder]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=quiet).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def _measure(name: str, folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    steps = train_fnrecipe(Path(folder)) if name == "fnrecipe" else _trl(Path(folder), SYSTEMS[name])
    next(steps)
    cpu, wall = time.process_time(), time.perf_counter()
    done = [next(steps) for _ in range(STEPS)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    trained, tokens, positions = (sum(counts) for counts in zip(*(attrs.astuple(each) for each, _ in done), strict=True))
    padding = 100 * (1 - tokens / positions)
    figures = (trained / cpu, trained / wall, tokens / cpu, padding, status("VmHWM"), done[-1][1])
    return dict(zip(UNITS, figures, strict=True))


def train_fnrecipe(folder: Path) -> Iterator[tuple[Counted, float]]:
    """What each step of `fnrecipe train sft` computes, and its loss."""
    from fnrecipe.build import batches, init_train_state, make_step
    from fnrecipe.config import resolve
    from fnrecipe.data import LaneAssignment
    from fnrecipe.parallel.mesh import Mesh
    from fnrecipe.recipes.sft.train import recipe
    from fnrecipe.runtime.host import keep_freed_memory
    from fnrecipe.runtime.products import measured

    keep_freed_memory()
    rows = f"max_seq_len: {LENGTH}, batch_size: 4, num_lanes: 4, too_long: cut"
    pairs = [
        f"model.config={json.dumps(attrs.asdict(CONFIG, filter=_told))}",
        f"dataset={{sources: {folder}/train.jsonl, valid_fraction: 0, {rows}}}",
        f"tokenizer={{family: hf, path: {folder}/tokenizer.json, eos_token: <|endoftext|>, add_bos: false}}",
        "gang={device: cpu, num_microbatches: 1}",
        "optimizer.config.lr=3e-4",
        "lr_scheduler.config.num_warmup_steps=0",
    ]
    config, _ = resolve(recipe.config, pairs=pairs)
    device = torch.device("cpu")
    state = init_train_state(recipe, config, Mesh(), device)
    step = make_step(recipe, config, Mesh(), device, choose=measured)
    for batch, _ in batches(recipe, config, LaneAssignment(), device)(None):
        state, sums = step(state, batch)
        counted = Counted(int(batch.mask.sum()), int((batch.segments >= 0).sum()), batch.tokens.numel())
        yield counted, float(sums["loss"] / sums["targets"])


def _told(attribute: Any, value: Any) -> bool:
    return bool(value != attribute.default)


def _trl(folder: Path, told: Mapping[str, str | int]) -> Iterator[tuple[Counted, float]]:
    """`SFTTrainer`, which fetches its batches by itself: it runs in a thread, and waits after each step."""
    from queue import Queue
    from threading import Thread

    done: Queue[Any] = Queue()
    go: Queue[None] = Queue()

    def wait(found: Any) -> None:
        done.put(found)
        go.get()

    train = _trainer(folder, told, wait)

    def work() -> None:
        try:
            train()
        except BaseException as error:  # the other thread waits for it
            done.put(error)

    Thread(target=work, daemon=True).start()
    while True:
        found = done.get()
        if isinstance(found, BaseException):
            raise found
        yield found
        go.put(None)


def _trainer(folder: Path, told: Mapping[str, str | int], report: Report) -> Callable[[], object]:
    import transformers
    import trl
    from datasets import load_dataset

    from benchmarks.peers.transformers import make_model
    from fnrecipe.data.tokenizer import END_OF_TEXT

    parts: list[Counted] = []
    losses: list[Any] = []

    class Trainer(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            here, mask = inputs["input_ids"].numel(), inputs.get("attention_mask")
            trained = int((inputs["labels"][:, 1:] != -100).sum())
            parts.append(Counted(trained, here if mask is None else int(mask.sum()), here))
            losses.append(super().training_step(model, inputs, *args, **options))
            return losses[-1]

    class Reporter(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            report((Counted(*map(sum, zip(*map(attrs.astuple, parts), strict=True))), float(sum(losses))))
            parts.clear()
            losses.clear()

    args = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=LENGTH,
        max_steps=1_000_000,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1_000_000,
        **told,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache"))
    trainer = Trainer(make_model(CONFIG), args, train_dataset=data, processing_class=tokenizer, callbacks=[Reporter()])
    return trainer.train


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
