"""From the sums of a loss to the numbers that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """`loss` as nats per target, and `bits_per_byte` of text if the sums count bytes; everything else as it is."""
    shown = dict(metrics)
    total = shown["loss"]
    shown["loss"] = total / shown["targets"] if shown["targets"] else math.nan
    if shown.get("bytes"):
        shown["bits_per_byte"] = total / math.log(2) / shown["bytes"]
    return shown
