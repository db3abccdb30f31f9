"""The capacity of the machine: memory and processes, found without importing torch where possible."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

_MEMORY = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def memory() -> int | None:
    """The most bytes of memory and swap that this process may use; None where the system does not say."""
    facts = _facts("/proc/meminfo")
    if "MemTotal" not in facts:
        return None
    swap = _kilobytes(facts.get("SwapTotal", "0"))
    limits = [_kilobytes(facts["MemTotal"]), *_cgroup_limits("memory", "memory.max", "memory.limit_in_bytes")]
    available = min(limits) + swap
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available if soft == resource.RLIM_INFINITY else min(available, soft)


def free_memory() -> int | None:
    """Bytes of memory that this process may still take without swapping; None where the system does not say."""
    facts = _facts("/proc/meminfo")
    if "MemAvailable" not in facts:
        return None
    return min([_kilobytes(facts["MemAvailable"]), *_cgroup_room()])


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
    found = [_read(folder / (old_name if old else name)).strip() for folder, old in _cgroups(controller)]
    return [int(text) for text in found if text.isdigit()]


def _cgroup_room() -> list[int]:
    """Bytes that each of these control groups leaves, counting cached files that were not used lately as free."""
    found = []
    for folder, old in _cgroups("memory"):
        limit, used = (_read(folder / name).strip() for name in _MEMORY[old])
        if limit.isdigit() and used.isdigit():
            cached = dict(line.split() for line in _read(folder / "memory.stat").splitlines()).get("inactive_file", "0")
            found.append(max(int(limit) - int(used) + int(cached), 0))
    return found


def _cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control group and of all its ancestors; whether they are of version 1."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller) if controllers else Path("/sys/fs/cgroup")
        group = root / path.lstrip("/")
        yield from ((folder, bool(controllers)) for folder in (group, *group.parents) if folder.is_relative_to(root))


def _facts(path: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition(":") for line in _read(path).splitlines())}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
