"""What lies where in the output directory of a run.

config.yaml            the resolved config; loads with --config-file
run.json               versions, command line, revision, device
products.json          what computes the large matrix products, as it was measured on the processor that the run began on
metrics/train.jsonl    one line a step: loss, gradient norm, learning rate, …
metrics/NAME.jsonl     one line an evaluation NAME, such as `valid`
metrics/spikes.jsonl   one line a step that was skipped, with its documents, under `regime.on_spike`
metrics/hashes.jsonl   one line a hash of the state, with `regime.hash_every_n_steps`
samples/NAME.jsonl     texts of an evaluation NAME, each with its step
checkpoints/           see fnrecipe.checkpoint
logs/rank_0.log        what the console said, and errors, each line with its time
logs/perf.jsonl        speed, use of the device, memory; the only record that differs from run to run
aside/N/               what `--from-step` has set aside: newer checkpoints, with the records that went with them
tensorboard/           the same for TensorBoard, where that is installed
rollbacks.jsonl        what was passed over, with `regime.on_spike=rollback`
sample.txt             text from the trained model
hugging_face/          the model as others load it, with `regime.export_hugging_face`
"""

from __future__ import annotations

from pathlib import Path

from fnrecipe.checkpoint.places import CHECKPOINTS as CHECKPOINTS
from fnrecipe.shell.directory.recorded_recipe import CONFIG as CONFIG
from fnrecipe.shell.directory.recorded_recipe import RUN as RUN

PRODUCTS, ROLLBACKS = "products.json", "rollbacks.jsonl"
SAMPLE, HUGGING_FACE = "sample.txt", "hugging_face"
LOCK = ".lock"


def log(rank: int) -> Path:
    return Path(f"logs/rank_{rank}.log")
