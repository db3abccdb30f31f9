"""Transforms of functions: each takes a function and gives one; they compose with each other and with `torch.func`."""

from fnrecipe.transforms.accumulate import accumulate as accumulate
from fnrecipe.transforms.gradients import evaluation as evaluation
from fnrecipe.transforms.gradients import gradients as gradients
from fnrecipe.transforms.jit import jit as jit
from fnrecipe.transforms.remat import remat as remat
from fnrecipe.transforms.unshard import unshard as unshard
from fnrecipe.transforms.unshard import unsharded_layer as unsharded_layer
