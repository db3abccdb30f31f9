"""Transforms of functions: each takes a function and gives one; they compose with each other and with `torch.func`."""

from fnrecipe.transforms.accumulate import accumulate as accumulate
from fnrecipe.transforms.jit import jit as jit
from fnrecipe.transforms.reduce import fast_sum as fast_sum
from fnrecipe.transforms.reduce import tree_sum as tree_sum
