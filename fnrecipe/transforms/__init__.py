"""Transforms of functions: each takes a function and gives one; they compose with each other and with `torch.func`."""

from fnrecipe.transforms.accumulate import accumulate as accumulate
from fnrecipe.transforms.jit import jit as jit
