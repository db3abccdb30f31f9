"""The modes of `trainer.jit`, and the backend of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

from fnrecipe.compiler import Run, inductor, interpreter

JitMode: TypeAlias = Literal["off", "trace", "inductor"]

BACKENDS: dict[JitMode, Callable[..., Run]] = {"trace": interpreter, "inductor": inductor}
"""What runs the graph, for each mode that traces one; `choose` says what computes its matrix products."""


def jit_mode(jit: Literal["auto"] | JitMode, device: torch.device) -> JitMode:
    """The mode that `trainer.jit` stands for on a device: `auto` compiles on a GPU, where each launch of a kernel costs."""
    if jit != "auto":
        return jit
    return "inductor" if device.type == "cuda" else "trace"
