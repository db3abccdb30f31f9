"""Events in the work of a device: a GPU reaches them after the host, which only enqueues work; a CPU at once."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import attrs
import torch


@attrs.frozen
class DeviceEvent:
    """The point at which a device has completed all work enqueued before `record_event` was called.

    seconds  the host's monotonic clock at that call
    event    None if the device is the host
    """

    seconds: float
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Blocks the host until the device has reached the event."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: DeviceEvent) -> float:
        """Seconds on the device from an earlier event to this one, after waiting for this one."""
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        self.wait()
        return float(earlier.event.elapsed_time(self.event)) / 1000


def record_event(device: torch.device) -> DeviceEvent:
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
    return DeviceEvent(time.monotonic(), event)


def work_seconds() -> float:
    """Seconds that this thread has run or, on Linux, has waited for a processor: all but those in which it was asleep."""
    waited = 0
    with suppress(OSError, ValueError, IndexError):
        waited = int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1])  # nanoseconds
    return time.thread_time() + waited / 1e9
