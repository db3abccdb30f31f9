"""The machine that a run uses: its device, threads, memory allocator and kernel cache, and facts for the run's record."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from fnrecipe.compiler.modes import JitMode
from fnrecipe.config.sections.run import TorchSection
from fnrecipe.errors import UsageError
from fnrecipe.runtime.launcher import launched
from fnrecipe.runtime.processor import instructions

_log = logging.getLogger(__name__)

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


def prepare(section: TorchSection, how: JitMode) -> None:
    """Process-wide settings of a process that trains: memory allocator, threads, kernel cache, the choice of kernels."""
    keep_freed_memory()
    set_threads(section.num_threads)
    if section.deterministic:
        use_deterministic_kernels()
    if how == "inductor":
        keep_compiled_kernels()


def set_threads(number: int | None) -> None:
    if number is not None:
        torch.set_num_threads(number)


def use_deterministic_kernels() -> None:
    """Has torch take kernels that give the same bits each time; an operation without one is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants it set for this, before cuBLAS begins
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing of ours reads what it has not written


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed large blocks for the next step; returns whether the allocator accepts the setting.

    By default each large block is mapped, faulted in and unmapped again in every step: 10 to 25 % of its CPU time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    largest = 2**31 - 1
    return bool(mallopt(_M_MMAP_THRESHOLD, largest) and mallopt(_M_TRIM_THRESHOLD, largest))


def keep_compiled_kernels() -> None:
    """Makes torch keep compiled kernels in the user's cache directory; its default is a directory for temporary files.

    Each kind of processor has a folder there. If that cannot be written to (a user may have no home), they go to a new
    directory, which is removed at exit.
    """
    try:
        # Torch compiles for the processor at hand, but finds what was compiled for another one, as on a cluster of two kinds
        # that share a home: code that it may not have, or loops over vectors of another width, which give wrong numbers.
        place = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache("inductor"))
        folder = place if place.name == instructions() else place / instructions()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        folder = Path(tempfile.mkdtemp(prefix="fnrecipe-inductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _log.warning("compiled kernels are in %s, and not kept for the next start: %s", folder, error)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def cache(name: str) -> Path:
    """A folder of the user's cache directory, which may not be there.

    Raises:
        RuntimeError: if the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fnrecipe" / name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """The peak so far in bytes: of allocated tensors on a GPU, of the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> str:
    """A message for the user if an error means that the host or the device is out of memory; empty for any other error."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not known and not re.search("can't allocate memory|[Oo]ut of memory|bad_alloc", str(error)):
        return ""
    tried = re.search(r"tried to allocate ([\d.]+ *\w+)", str(error), re.IGNORECASE)
    return (
        f"out of memory{f' at {tried[1]} more' if tried else ''}; what takes less: a smaller dataset.batch_size, a greater "
        "gang.num_microbatches, trainer.logits_at_once, trainer.activation_checkpointing.mode=selective or layerwise, "
        "gang.sharding=fsdp on several processes, a smaller model"
    )


def process_started() -> float:
    """The start of this process, before its imports, on the monotonic clock; now, where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age


def versions() -> dict[str, str]:
    packages = ("fnrecipe", "torch", "numpy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def facts(device: torch.device) -> dict[str, object]:
    """Facts needed to repeat a run: versions, command line, git revision and device; never the environment."""
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
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
