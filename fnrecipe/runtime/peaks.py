"""Peak FLOP/s of GPUs, from their data sheets."""

from __future__ import annotations

import re

_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L4": 121e12,
    "L40S": 362e12,
}


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU, by its name from `torch.cuda.get_device_name`; None if unknown.

    The peak of a slice of a GPU (MIG) is unknown.
    """
    if re.search(r"\bMIG\b", device):
        return None
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
