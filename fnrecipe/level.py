"""How the train step runs: the levels of `trainer.jit`, and what belongs to each."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
import torch

from fnrecipe.optim import Transform
from fnrecipe.transforms import Backend, inductor, interpreter

Level: TypeAlias = Literal["off", "trace", "inductor"]

BACKENDS: dict[Level, Backend] = {"trace": interpreter, "inductor": inductor}
"""What runs the graph at each level that has one."""


def level(jit: Literal["auto"] | Level, device: torch.device) -> Level:
    """What `trainer.jit` stands for on a device: `auto` compiles where kernels are launched one by one, on a GPU."""
    if jit != "auto":
        return jit
    return "inductor" if device.type == "cuda" else "trace"


def fitting(update: Transform, level: Level) -> Transform:
    """The update as the level wants it: Inductor makes a kernel of the whole by itself, and reads the gradients once."""
    return attrs.evolve(update, apply=None) if level == "inductor" else update
