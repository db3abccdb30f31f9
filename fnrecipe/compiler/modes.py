"""How the train step runs: the levels of `trainer.jit`, and what belongs to each."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from fnrecipe.compiler import Backend, inductor, interpreter

Level: TypeAlias = Literal["off", "trace", "inductor"]

BACKENDS: dict[Level, Backend] = {"trace": interpreter, "inductor": inductor}
"""What runs the graph at each level that has one."""


def level(jit: Literal["auto"] | Level, device: torch.device) -> Level:
    """What `trainer.jit` stands for on a device: `auto` compiles where kernels are launched one by one, on a GPU."""
    if jit != "auto":
        return jit
    return "inductor" if device.type == "cuda" else "trace"
