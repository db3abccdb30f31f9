"""The 8-bit numbers of dynamic quantisation: more of the bits for the exponent where numbers are small, for the rest elsewhere.

(Dettmers 2016, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861.) The 256 numbers are 0, 1, and in each of the seven
powers of ten below 1 the centres of 2 ** k equal cells, k from 0 to 6, with both signs; or of twice as many, without. A code is
the place of its number among them, in ascending order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

POWERS = range(7)


def decode(codes: Tensor, signed: bool) -> Tensor:
    """The numbers that codes, uint8, stand for, float32."""
    return torch.take(numbers(signed, codes.device), codes.long())


def numbers(signed: bool, device: torch.device) -> Tensor:
    """All of them, ascending, float32 [256]."""
    # By operations: a table from Python would be copied to a GPU in each step, which a CUDA graph cannot hold.
    cells = _cells(signed)
    number = torch.arange(cells, 128 * cells, device=device, dtype=torch.float64)
    power = (number / cells).log2().floor()
    width = torch.exp2(power) * cells
    positive = torch.pow(10.0, power - 6) * (0.9 * (number + 0.5) / width - 0.8)
    ends = torch.arange(2, device=device, dtype=torch.float64)
    negative = -positive.flip(0) if signed else positive[:0]
    return torch.cat([negative, ends[:1], positive, ends[1:]]).float()


def encode(values: Tensor, signed: bool) -> Tensor:
    """The codes, uint8, of the numbers that are nearest to `values`, float32 in [-1, 1]."""
    # A cell's number from 1 on, and how far in the cell a magnitude is, are linear in it within a power of ten. Each line is
    # flatter than the one before it, which it meets at the power's end: so the least of all lines is the right one. This is a
    # dozen passes over memory; a binary search among 255 borders, `torch.bucketize`, takes a CPU five times as long.
    cells, size = _cells(signed), values.abs()
    place = functools.reduce(torch.minimum, (_line(size, cells, power) for power in POWERS))
    cell = place.int()
    # The border between two powers is midway between the centres of cells of two widths, a fifth into the first wider one.
    early = ((cell & (cell - 1)) == 0) & (place - cell < 0.2)
    cell = (cell - early.int()).clamp(min=cells) + (place > 128 * cells - 0.25).int()
    least = 10.0 ** -POWERS[-1] * (0.1 + 0.45 / cells)
    cell = cell * (size >= least / 2)
    codes = cell * values.sign().int() + 127 if signed else cell - 1
    return codes.clamp(min=0).to(torch.uint8)


def _cells(signed: bool) -> int:
    """Cells in the least power of ten."""
    return 1 if signed else 2


def _line(size: Tensor, cells: int, power: int) -> Tensor:
    """`cells` * 2 ** power * (1 + the share of that power of ten that lies below `size`)."""
    width = cells * 2.0**power
    return torch.rsub(size, width * 8 / 9, alpha=-width * 10.0 ** (6 - power) / 0.9)
