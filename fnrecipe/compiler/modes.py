"""How the train step runs: the levels of `trainer.jit`, and what belongs to each."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from fnrecipe.compiler import Backend, inductor, interpreter

JitMode: TypeAlias = Literal["off", "trace", "inductor"]

BACKENDS: dict[JitMode, Backend] = {"trace": interpreter, "inductor": inductor}
"""What runs the graph at each level that has one."""


def jit_mode(jit: Literal["auto"] | JitMode, device: torch.device) -> JitMode:
    """What `trainer.jit` stands for on a device: `auto` compiles where kernels are launched one by one, on a GPU."""
    if jit != "auto":
        return jit
    return "inductor" if device.type == "cuda" else "trace"
