"""From the sums of a loss to the numbers that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each `loss` as nats per target, and `bits_per_byte` of text if the sums count bytes; everything else as it is."""
    shown = dict(metrics)
    for name in [name for name in shown if name.partition("/")[0] == "loss"]:
        count = shown[f"targets{name.removeprefix('loss')}"]
        shown[name] = shown[name] / count if count else math.nan
    if shown.get("bytes"):
        shown["bits_per_byte"] = metrics["loss"] / math.log(2) / shown["bytes"]
    return shown
