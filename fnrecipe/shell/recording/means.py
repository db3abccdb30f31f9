"""From the sums of a loss to the numbers that people read, by the names that the field gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def means(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """A row of metrics of a `kind` ("train", or the name of an evaluation): `step`, and the others as `KIND/NAME`.

    Each `loss` becomes nats per target, and each `mean/NAME` the mean NAME; `bits_per_byte` of text is there if the sums count
    bytes; all else stays as it is.
    """
    shown = dict(metrics)
    for name in [name for name in shown if name.partition("/")[0] == "loss"]:
        count = shown[f"targets{name.removeprefix('loss')}"]
        shown[name] = shown[name] / count if count else math.nan
    for name in [name for name in shown if name.partition("/")[0] == "mean"]:
        total, mean = shown.pop(name), name.removeprefix("mean/")
        count = shown.get(f"targets/{mean}", shown["targets"])
        shown[mean] = total / count if count else math.nan
    if shown.get("bytes"):
        shown["bits_per_byte"] = metrics["loss"] / math.log(2) / shown["bytes"]
    step = shown.pop("step")
    return {"step": step, **{f"{kind}/{name}": value for name, value in shown.items()}}
