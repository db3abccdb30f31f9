"""Checks that a config fits on the machine, before torch is imported and anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TypeVar

import click

from fnrecipe.cli.units import si
from fnrecipe.config import ShellConfig
from fnrecipe.config.needs import Need
from fnrecipe.errors import UsageError
from fnrecipe.runtime import capacity
from fnrecipe.runtime.launcher import launched, meeting

C = TypeVar("C", bound=ShellConfig)

_DAY, _LONG = 24 * 3600, 600


def check_fit(
    config: C,
    needs: Callable[[C, int], Sequence[Need]] | None,
    *,
    parts: Sequence[str],
    ranks: int = 1,
    local: int = 1,
) -> None:
    """Checks that `local` of a run's `ranks` processes fit on this machine, counting the needs of `parts` only.

    Raises:
        UsageError: if there is clearly less than the config needs at least; names the keys that determine it.
    """
    if needs is None:
        return
    found = [need for need in needs(config, ranks) if need.part in parts]
    on_device = [need for need in found if need.on_device]
    device = capacity.device_memory() if on_device and config.gang.device != "cpu" else None
    if device is not None:
        _compare(config, on_device, device, "a GPU", 1)
    on_host = [need for need in found if device is None or not need.on_device]
    _compare(config, on_host, capacity.memory(), "this machine", local)
    if "workers" in parts:
        _count_processes(config, local)
    _check_time(config, found)


def of_training(config: ShellConfig) -> list[str]:
    """The parts of `Need` that training has."""
    return ["state", "batch", "stream", "workers", *(["graph"] if config.trainer.jit != "off" else [])]


def world() -> tuple[int, int]:
    """The number of processes of the run, by the environment, and how many of them are on this machine, at least."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return launched().size, int(local) if local.isdecimal() else 1


def _compare(config: ShellConfig, needs: Sequence[Need], available: int | None, where: str, times: int) -> None:
    total = times * sum(need.size for need in needs)
    if available is None or total <= available:
        return
    large = sorted((need for need in needs if 10 * times * need.size >= total), key=lambda need: -need.size)
    told = ", ".join(f"{si(times * need.size, 'B')} for {need.what} ({_values(config, need.keys)})" for need in large)
    processes = f" for {times} processes" if times > 1 else ""
    raise UsageError(
        f"memory: expected at most the {si(available, 'B')} of {where}, found at least {si(total, 'B')}{processes}: {told}"
    )


def _check_time(config: ShellConfig, needs: Sequence[Need]) -> None:
    """Refuses a start-up of more than a day before the first step, and announces one of more than ten minutes."""
    seconds = sum(need.seconds for need in needs)
    slow = [f"{need.what} ({_values(config, need.keys)})" for need in needs if need.seconds]
    told = f"at least {seconds / 3600:,.1f} hours: {', '.join(slow)}"
    if seconds > _DAY:
        raise UsageError(f"time: expected at most a day before the first step, found {told}")
    if seconds > _LONG and meeting() is None and launched().rank == 0:
        click.echo(f"the first step is a long way off, {told}", err=True)


def _count_processes(config: ShellConfig, local: int) -> None:
    threads, workers, limit = config.common.torch.num_threads or 1, config.dataset.num_workers, capacity.processes()
    if limit is not None and local * (threads + workers) > limit:
        keys = _values(config, ("dataset.num_workers", "common.torch.num_threads"))
        found = f"{local * (threads + workers):,} ({keys})"
        raise UsageError(f"processes: expected at most {limit:,} processes and threads at once on this machine, found {found}")


def _values(config: ShellConfig, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} = {attrgetter(key)(config)}" for key in keys)
