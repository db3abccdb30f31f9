"""The machine under a run: its device, threads and memory allocator, and what to note down about it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fnrecipe.errors import UsageError
from fnrecipe.launcher import launched

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: for `cuda` without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("gang.device: expected a CUDA device for gang.device=cuda, found none; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launched().local_rank % torch.cuda.device_count())


def prepare(num_threads: int | None) -> None:
    """What every process that trains sets before it does."""
    keep_freed_memory()
    set_threads(num_threads)
    keep_compiled_kernels()


def set_threads(number: int | None) -> None:
    if number is not None:
        torch.set_num_threads(number)


def keep_freed_memory() -> bool:
    """Tells glibc to keep big blocks that are freed for the next step, rather than give them back and fault them in again.

    Whether the allocator took the setting. (It takes 10 to 25 % off the CPU time of a step.)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    largest = 2**31 - 1
    return bool(mallopt(_M_MMAP_THRESHOLD, largest) and mallopt(_M_TRIM_THRESHOLD, largest))


def freeze_objects() -> None:
    """Takes all objects that are there, a graph of thousands above all, out of the garbage collector's rounds (0.2 s each)."""
    gc.collect()
    gc.freeze()


def unfreeze_objects() -> None:
    gc.unfreeze()


def keep_compiled_kernels() -> None:
    """Has torch keep them in the user's cache, for the next start: its own choice is the folder of temporary files."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache) / "fnrecipe" / "inductor"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    packages = ("fnrecipe", "torch", "numpy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def facts(device: torch.device) -> dict[str, Any]:
    """What somebody needs to know to run this again: versions, command line, revision and device; never the environment."""
    return {
        "versions": versions(),
        "argv": sys.argv,
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
    }


def _git_revision() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
