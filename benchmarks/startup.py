"""Start-up: CPU seconds of whole processes, up to their end or up to the first step."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Result

PROGRAM = "from fnrecipe.cli.main import main; import sys; sys.argv = ['fnrecipe', *sys.argv[1:]]; main()"
ONE_STEP = (
    "regime.num_steps=1 lr_scheduler.config.num_warmup_steps=0 regime.num_validation_batches=1 regime.num_sample_tokens=0"
)
SYSTEMS = {
    "python -c pass": ("pass",),
    "import torch": ("import torch",),
    "fnrecipe --help": (PROGRAM, "--help"),
    "fnrecipe dump-config lm": (PROGRAM, "dump-config", "lm"),
    "fnrecipe train lm, 1 step, 1 leaf": (PROGRAM, "train", "lm", "--config", *ONE_STEP.split(), "gang.num_microbatches=1"),
    "fnrecipe train lm, 1 step, 8 leaves": (PROGRAM, "train", "lm", "--config", *ONE_STEP.split()),
}


def run(rounds: int) -> list[Result]:
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for number in range(1 + rounds):
        for system, (program, *args) in SYSTEMS.items():
            used = _cpu_seconds(program, args)
            if number:
                seconds[system].append(used)
    return [Result("startup", "fresh process", system, "CPU time", values, "s") for system, values in seconds.items()]


def _cpu_seconds(program: str, args: list[str]) -> float:
    with tempfile.TemporaryDirectory() as out:
        more = ["--out", str(Path(out) / "run")] if "train" in args else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program, *args, *more], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
