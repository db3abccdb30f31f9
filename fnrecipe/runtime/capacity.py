"""The capacity of the machine: memory and processes, found without importing torch where possible."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def memory() -> int | None:
    """The most bytes of memory and swap that this process may use; None where the system does not say."""
    facts = {name: value for name, _, value in (line.partition(":") for line in _read("/proc/meminfo").splitlines())}
    if "MemTotal" not in facts:
        return None
    swap = _kilobytes(facts.get("SwapTotal", "0"))
    limits = [_kilobytes(facts["MemTotal"]), *_cgroup_limits("memory", "memory.max", "memory.limit_in_bytes")]
    available = min(limits) + swap
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available if soft == resource.RLIM_INFINITY else min(available, soft)


def processes() -> int | None:
    """The most processes and threads that may run at once; None where the system does not say."""
    limits = _cgroup_limits("pids", "pids.max", "pids.max")
    limits += [int(_read(f"/proc/sys/kernel/{name}") or 0) for name in ("threads-max", "pid_max")]
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY:  # the kernel does not apply it to root
        limits.append(soft)
    return min((limit for limit in limits if limit > 0), default=None)


def device_memory() -> int | None:
    """Bytes of memory of the largest GPU; None without one. Imports torch only if there is a driver."""
    if not any(Path(path).exists() for path in _GPU_FILES):
        return None
    import torch

    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return max(sizes, default=None)


def _cgroup_limits(controller: str, name: str, old_name: str) -> list[int]:
    """The limits of this process's control group and of all its ancestors, in cgroups version 2 and 1."""
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, file = (Path("/sys/fs/cgroup", controller), old_name) if controllers else (Path("/sys/fs/cgroup"), name)
        group = root / path.lstrip("/")
        found += [_read(folder / file).strip() for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [int(text) for text in found if text.isdigit()]


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
