"""Moments in the work of a device: a GPU comes to them behind the host, which only gives it work; a CPU at once."""

from __future__ import annotations

import time

import attrs
import torch


@attrs.frozen
class DeviceEvent:
    """The end of all that a device was given before `record_event` was called.

    seconds  of the host's clock at that call
    event    None where the device is the host
    """

    seconds: float
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Waits until the device has come to it."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: DeviceEvent) -> float:
        """Seconds of the device from an earlier moment to this one, which it waits for."""
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
