"""This process as its launcher describes it in the environment: torchrun, Slurm's srun, or `fnrecipe train --nproc`."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

import attrs

from fnrecipe.errors import UsageError

VARIABLE = "FNRECIPE_LAUNCHER"
"""Set for the ranks of `--nproc`: the process id of their launcher, a colon, and their rendezvous directory."""

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_PR_SET_PDEATHSIG = 1

Get = Callable[[str], str | None]


@attrs.frozen
class Launched:
    """This process as its launcher started it: alone, or as one of several ranks.

    rank, size, local_rank    its rank, the number of ranks, its rank on this machine
    address, port             of the rendezvous, for torchrun and Slurm
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


def launched(get: Get = os.environ.get) -> Launched:
    """Reads the environment: torch's variables if one of them is set, else those of a Slurm job step.

    A Slurm job without a step (`sbatch`, `salloc`), a step of one task and an interactive one (`srun --pty`) train alone.

    Raises:
        UsageError: if variables are missing, not numbers, or contradict each other.
    """
    if get(VARIABLE) is not None and meeting(get) is None:
        raise UsageError(f"{VARIABLE}: expected the parent of this process, {os.getppid()}, found {get(VARIABLE)!r}")
    if any(get(name) is not None for name in _TORCH):
        rank, size, local_rank = _ranks(_TORCH, get)
        if size == 1 or meeting(get) is not None:
            return Launched(rank, size, local_rank)
        return Launched(rank, size, local_rank, _address(get), _port(get))
    if get("SLURM_STEP_NUM_TASKS") in (None, "1") or get("SLURM_PTY_PORT") is not None:
        return Launched()
    rank, size, local_rank = _ranks(_SLURM, get)
    address = first_host(get("SLURM_STEP_NODELIST") or "") if get("MASTER_ADDR") is None else _address(get)
    return Launched(rank, size, local_rank, address, _slurm_port(get) if get("MASTER_PORT") is None else _port(get))


def meeting(get: Get = os.environ.get) -> Path | None:
    """The rendezvous directory of the ranks of `--nproc`; None for a process that `--nproc` did not start."""
    parent, _, directory = (get(VARIABLE) or "").partition(":")
    return Path(directory) if directory and parent == str(os.getppid()) else None


def export(here: Launched) -> None:
    """Sets torch's variables in a rank that Slurm started."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(here.rank), str(here.size)
    os.environ["LOCAL_RANK"] = str(here.local_rank)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = here.address, str(here.port)


def follow() -> None:
    """Makes a rank of `--nproc` or torchrun die with its launcher, by SIGKILL, which a process that hangs cannot miss."""
    if meeting() is not None:
        parent = int(os.environ[VARIABLE].partition(":")[0])
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run handles signals; an early one is reported by the launcher
    elif os.environ.get("TORCHELASTIC_RUN_ID") is not None:
        parent = os.getppid()
    else:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        Thread(target=watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def watch(parent: int) -> None:
    """Polls until `parent` has ended, then kills this process; for kernels without `PR_SET_PDEATHSIG`."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def first_host(hosts: str) -> str:
    """The first host of a Slurm list: `gpu[003-010,012]-ib,cpu7` begins with gpu003-ib."""
    first = re.match(r"(?:[^\[\],\s]|\[[^\[\]\s]+\])+", hosts)
    if first is None or hosts[first.end() :][:1] not in ("", ","):
        raise UsageError(f"SLURM_STEP_NODELIST: expected a list of hosts, found {hosts!r}")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _ranks(names: Sequence[str], get: Get) -> tuple[int, int, int]:
    """Rank, world size and local rank, from the variables `names`."""
    numbers = [_number(get(name)) for name in names]
    if None in numbers:
        raise UsageError(f"{', '.join(names)}: expected a number in each of them, {_found(names, get)}")
    rank, size, local_rank = (number for number in numbers if number is not None)
    if not max(rank, local_rank) < size:
        raise UsageError(f"{names[0]}, {names[2]}: expected numbers below {names[1]}, {_found(names, get)}")
    return rank, size, local_rank


def _address(get: Get) -> str:
    address = get("MASTER_ADDR") or ""
    if not address or not address.isprintable() or " " in address:
        raise UsageError(f"MASTER_ADDR: expected the host of rank 0, {_found(['MASTER_ADDR', *_TORCH], get)}")
    return address


def _port(get: Get) -> int:
    port = _number(get("MASTER_PORT"))
    if port is None or not 0 < port < 2**16:
        raise UsageError(f"MASTER_PORT: expected a port from 1 to 65535, {_found(['MASTER_PORT', *_TORCH], get)}")
    return port


def _slurm_port(get: Get) -> int:
    """A port below the ephemeral range, different for the steps of a job and for consecutive jobs."""
    job, step = _number(get("SLURM_JOB_ID")), _number(get("SLURM_STEP_ID") or "0")
    if job is None or step is None:
        names = ["SLURM_JOB_ID", "SLURM_STEP_ID"]
        raise UsageError(f"{', '.join(names)}: expected a number in each of them, or a MASTER_PORT, {_found(names, get)}")
    return 20000 + (16 * job + step) % 12000


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,10}", text) else None


def _found(names: Sequence[str], get: Get) -> str:
    values = [name + (" unset" if (value := get(name)) is None else f"={value!r}") for name in names]
    return f"found {', '.join(values)}; start all processes by torchrun, srun or --nproc, or unset these variables"
