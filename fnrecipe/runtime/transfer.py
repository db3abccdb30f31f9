"""Asynchronous copies of scalars from the device to the host, which waits only when it reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from fnrecipe.runtime.clock import DeviceEvent, record_event


@attrs.frozen
class PendingCopy:
    """Columns [rows] in host memory, valid after `ready`."""

    columns: Mapping[str, Tensor]
    ready: DeviceEvent

    def rows(self) -> list[dict[str, float]]:
        """The values, after waiting for the copy; integers stay integers."""
        self.ready.wait()
        values = zip(*(column.tolist() for column in self.columns.values()), strict=True)
        return [dict(zip(self.columns, row, strict=True)) for row in values]


def fetch(rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> PendingCopy:
    """Starts a copy of the 0-d tensors of `rows`, which all have the same names; from CUDA into pinned memory."""
    names = rows[0] if rows else {}
    columns = {name: torch.stack([row[name] for row in rows]).to("cpu", non_blocking=True) for name in names}
    return PendingCopy(columns, record_event(device))


def publication_delay(device: torch.device) -> int:
    """By how many publications metrics are read late: by then their copy is complete, and the host need not wait for it."""
    return 1 if device.type == "cuda" else 0
